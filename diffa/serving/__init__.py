"""The server: requests of OpenAI's protocol, answered by one model in shared forward passes."""
