"""Flamingo's perceiver resampler: a fixed number of latents for any number of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from diffa.adapters.cross_attention import (
    FeedForward,
    MultiHeadAttention,
    check_sizes,
    learned_queries,
)
from diffa.adapters.layer_mixing import LayerMixer, frame_mask
from diffa.types import Embeds, Features, FeatureSpec


class Perceiver(nn.Module):
    """Latents that attend to frames and latents at once (Flamingo, Alayrac et al. 2022, sec. 3.1).

    Frames get sinusoidal positions before the first layer; attention alone ignores their order.

    Args:
        num_queries: Latents, the number of embeddings of every recording.
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
        num_queries: int = 64,
        num_layers: int = 2,
        intermediate_size: int = 3072,
        dropout: float = 0.0,
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
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
        self.queries = learned_queries(num_queries, source.width)
        self.layers = nn.ModuleList(
            _Layer(source, intermediate_size, dropout) for _ in range(num_layers)
        )
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return the number of latents for every row, whatever its frames (B,)."""
        return torch.full_like(lengths, len(self.queries))

    def forward(self, features: Features) -> Embeds:
        """Embed the true frames."""
        frames = self.mixer(features, self.queries.dtype)
        frames = frames + sinusoidal_positions(frames)
        # frames, then the latents, which every row has: (B, T + Q)
        attn_mask = frame_mask(features.lengths, frames.shape[1])
        attn_mask = F.pad(attn_mask, (0, len(self.queries)), value=True)
        hidden = repeat(self.queries, "q d -> b q d", b=len(frames))
        # (B, Q, D) latents; each layer attends to T frames and Q latents
        for layer in self.layers:
            hidden = layer(hidden, frames, attn_mask)
        return Embeds(self.proj(hidden), self.out_lengths(features.lengths))


class _Layer(nn.Module):
    """Cross-attention to frames and latents together, then a feed-forward (Flamingo, fig. 5)."""

    def __init__(self, source: FeatureSpec, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.frame_norm, self.norm = nn.LayerNorm(source.width), nn.LayerNorm(source.width)
        self.cross_attention = MultiHeadAttention(source.width, source.heads, dropout)
        self.feed_forward = FeedForward(source.width, intermediate_size)

    def forward(self, hidden: Tensor, frames: Tensor, attn_mask: Tensor) -> Tensor:
        latents = self.norm(hidden)
        both = torch.cat([self.frame_norm(frames), latents], dim=1)
        hidden = hidden + self.cross_attention(latents, both, attn_mask)
        out: Tensor = hidden + self.feed_forward(hidden)
        return out


def sinusoidal_positions(frames: Tensor) -> Tensor:
    """Return sinusoids (T, width) for frames (B, T, width) (Vaswani et al. 2017, sec. 3.5)."""
    count, width = frames.shape[1:]
    steps = torch.arange(count, device=frames.device)[:, None]
    places = torch.arange(width, device=frames.device)
    angles = steps / 10000 ** (places // 2 * 2 / width)
    return torch.where(places % 2 == 0, angles.sin(), angles.cos()).to(frames.dtype)
