"""The canvas: prompts and answers as slots, the KV cache, and the forward pass over them."""

from diffa.canvas.canvas import Canvas
from diffa.canvas.denoiser import Denoiser
from diffa.canvas.kv_cache import AttentionContext, KVCache

__all__ = ["AttentionContext", "Canvas", "Denoiser", "KVCache"]
