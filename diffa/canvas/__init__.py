"""The canvas: prompts and answers as slots, the KV cache, and the forward pass over them."""
