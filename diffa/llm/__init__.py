"""Client of OpenAI-compatible chat models, used by data synthesis and by the judge."""
