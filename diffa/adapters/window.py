"""SALMONN's window-level Q-Former: a few queries per window of a third of a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from diffa.adapters.cross_attention import (
    FeedForward,
    MultiHeadAttention,
    check_sizes,
    learned_queries,
)
from diffa.adapters.layer_mixing import LayerMixer, frame_mask, masked_embeds
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Window(nn.Module):
    """A Q-Former over windows of frames (SALMONN, Tang et al. 2024, sec. 3.1).

    The same queries read every window, so the number of embeddings grows with the audio and keeps
    its order. SALMONN uses 1 query per window, Whisper-LLaDA (Li et al. 2025) 4.

    Args:
        num_queries: Queries per window.
        window_seconds: Length of a window, in seconds; SALMONN's 0.333 s are 17 frames of Whisper.
        num_layers: Layers of the adapter.
        intermediate_size: Width of the feed-forward network.
        dropout: Dropout probability of the attention weights.
        mix_layers: Read a learned mixture of all encoder states instead of the last one.
    """

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        num_queries: int = 1,
        window_seconds: float = 1 / 3,
        num_layers: int = 2,
        intermediate_size: int = 3072,
        dropout: float = 0.1,
        mix_layers: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            source,
            dropout,
            num_queries=num_queries,
            num_layers=num_layers,
            intermediate_size=intermediate_size,
        )
        if not 0 < window_seconds < 1e6:
            raise SpecError(f"window_seconds must be positive and finite, got {window_seconds}")
        self.frames = max(1, round(window_seconds * source.rate))
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
        self.queries = learned_queries(num_queries, source.width)
        self.layers = nn.ModuleList(
            _Layer(source, intermediate_size, dropout) for _ in range(num_layers)
        )
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: queries of every window."""
        return -(-lengths // self.frames) * len(self.queries)

    def forward(self, features: Features) -> Embeds:
        """Embed every window from its true frames."""
        lengths = self.out_lengths(features.lengths)
        frames = self.mixer(features, self.queries.dtype)
        # (B, T, D) -> (B * windows, size, D), the last window filled with zeros
        windows, size = -(-frames.shape[1] // self.frames), self.frames
        frames = F.pad(frames, (0, 0, 0, windows * size - frames.shape[1]))
        frames = rearrange(frames, "b (n t) d -> (b n) t d", n=windows, t=size)
        starts = torch.arange(windows, device=lengths.device) * size
        # Windows past a row's end attend to one frame, so that no softmax is empty; zeroed below.
        count = (features.lengths[:, None] - starts).clamp(1, size).flatten()
        attn_mask = frame_mask(count, size)
        hidden = repeat(self.queries, "q d -> m q d", m=len(frames))
        for layer in self.layers:
            hidden = layer(hidden, frames, attn_mask)
        values = rearrange(self.proj(hidden), "(b n) q w -> b (n q) w", b=len(lengths), n=windows)
        return masked_embeds(values, lengths)


class _Layer(nn.Module):
    """Self-attention, cross-attention to the frames, feed-forward; each after a norm."""

    def __init__(self, source: FeatureSpec, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        width, heads = source.width, source.heads
        self.self_norm, self.self_attention = (
            nn.LayerNorm(width),
            MultiHeadAttention(width, heads, dropout),
        )
        self.cross_norm, self.cross_attention = (
            nn.LayerNorm(width),
            MultiHeadAttention(width, heads, dropout),
        )
        self.feed_forward = FeedForward(width, intermediate_size)

    def forward(self, hidden: Tensor, frames: Tensor, attn_mask: Tensor) -> Tensor:
        queries = self.self_norm(hidden)
        hidden = hidden + self.self_attention(queries, queries, None)
        hidden = hidden + self.cross_attention(self.cross_norm(hidden), frames, attn_mask)
        out: Tensor = hidden + self.feed_forward(hidden)
        return out
