"""Flamingo's perceiver resampler: any number of frames into a fixed number of latents."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from diffa.adapters.cross_attention import Attention, FeedForward, bank, check
from diffa.adapters.layer_mixing import Reading, inside_of
from diffa.types import Embeds, Features, FeatureSpec


class Perceiver(nn.Module):
    """``num_queries`` latents that read the true frames and themselves at once (Alayrac et al. 2022,
    Flamingo, sec. 3.1 and fig. 5).

    Frames get sinusoidal positions before the first layer, as time would else be lost. ``mix_layers``
    reads a learned mixture of all the encoder's states.
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
        check(
            source.width,
            source.heads,
            dropout,
            num_queries=num_queries,
            num_layers=num_layers,
            intermediate_size=intermediate_size,
        )
        self.reading = Reading(source, mix_layers=mix_layers)
        self.queries = bank(num_queries, source.width)
        self.layers = nn.ModuleList(
            _Layer(source, intermediate_size, dropout) for _ in range(num_layers)
        )
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return the number of latents for every row, whatever its frames (B,)."""
        return torch.full_like(lengths, len(self.queries))

    def forward(self, features: Features) -> Embeds:
        """Embed the last state; nothing past a row's length is read."""
        frames = self.reading(features, self.queries.dtype)
        frames = frames + positions(frames)
        attn_mask = inside_of(features.lengths, frames.shape[1] + len(self.queries))
        attn_mask[:, frames.shape[1] :] = True  # the latents, which every row has
        attn_mask[:, : frames.shape[1]] = inside_of(features.lengths, frames.shape[1])
        hidden = repeat(self.queries, "q d -> b q d", b=len(frames))
        for layer in self.layers:
            hidden = layer(hidden, frames, attn_mask)
        return Embeds(self.proj(hidden), self.out_lengths(features.lengths))


class _Layer(nn.Module):
    """Latents read frames and latents together, then think (Flamingo, fig. 5)."""

    def __init__(self, source: FeatureSpec, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.frame_norm, self.norm = nn.LayerNorm(source.width), nn.LayerNorm(source.width)
        self.read = Attention(source.width, source.heads, dropout)
        self.think = FeedForward(source.width, intermediate_size)

    def forward(self, hidden: Tensor, frames: Tensor, attn_mask: Tensor) -> Tensor:
        latents = self.norm(hidden)
        both = torch.cat([self.frame_norm(frames), latents], dim=1)
        hidden = hidden + self.read(latents, both, attn_mask)
        out: Tensor = hidden + self.think(hidden)
        return out


def positions(frames: Tensor) -> Tensor:
    """Return sinusoids (T, width) for frames (B, T, width) (Vaswani et al. 2017, sec. 3.5)."""
    count, width = frames.shape[1:]
    steps = torch.arange(count, device=frames.device)[:, None]
    places = torch.arange(width, device=frames.device)
    angles = steps / 10000 ** (places // 2 * 2 / width)
    return torch.where(places % 2 == 0, angles.sin(), angles.cos()).to(frames.dtype)
