"""SALMONN's window-level Q-Former: a few queries for every third of a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from diffa.adapters.cross_attention import Attention, FeedForward, bank, check
from diffa.adapters.layer_mixing import Reading, inside_of
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Window(nn.Module):
    """``num_queries`` for every window of ``window_seconds`` of frames (Tang et al. 2024, SALMONN, sec. 3.1).

    The same queries read every window of the last state, so their number grows with the audio
    and their order is time's. SALMONN uses 1 query, Whisper-LLaDA (Li et al. 2025) 4.

    Args:
        num_queries: per window.
        window_seconds: of a window; SALMONN's 0.333 s are 17 frames of Whisper.
        num_layers: layers of self-attention, cross-attention and feed-forward.
        intermediate_size: width of the feed-forward.
        dropout: of the attention weights.
        mix_layers: read a learned mixture of all the encoder's states.
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
        check(
            source.width,
            source.heads,
            dropout,
            num_queries=num_queries,
            num_layers=num_layers,
            intermediate_size=intermediate_size,
        )
        if not 0 < window_seconds < 1e6:
            raise SpecError(f"window_seconds must be positive and finite, got {window_seconds}")
        self.frames = max(1, round(window_seconds * source.rate))
        self.reading = Reading(source, mix_layers=mix_layers)
        self.queries = bank(num_queries, source.width)
        self.layers = nn.ModuleList(
            _Layer(source, intermediate_size, dropout) for _ in range(num_layers)
        )
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return the embeddings of ``lengths`` (B,) frames: the queries of every window begun."""
        return -(-lengths // self.frames) * len(self.queries)

    def forward(self, features: Features) -> Embeds:
        """Embed every window from its true frames."""
        lengths = self.out_lengths(features.lengths)
        frames = self.reading(features, self.queries.dtype)
        windows, size = -(-frames.shape[1] // self.frames), self.frames
        frames = F.pad(frames, (0, 0, 0, windows * size - frames.shape[1]))
        frames = rearrange(frames, "b (n t) d -> (b n) t d", n=windows, t=size)
        starts = torch.arange(windows, device=lengths.device) * size
        # windows past a row's end see one frame, so that no softmax is empty; they are cut below
        count = (features.lengths[:, None] - starts).clamp(1, size).flatten()
        attn_mask = inside_of(count, size)
        hidden = repeat(self.queries, "q d -> m q d", m=len(frames))
        for layer in self.layers:
            hidden = layer(hidden, frames, attn_mask)
        values = rearrange(self.proj(hidden), "(b n) q w -> b (n q) w", b=len(lengths), n=windows)
        inside = inside_of(lengths, values.shape[1])[..., None]
        return Embeds(torch.where(inside, values, 0), lengths)


class _Layer(nn.Module):
    """Queries read each other, then the frames, then think; each behind a norm."""

    def __init__(self, source: FeatureSpec, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        width, heads = source.width, source.heads
        self.own_norm, self.own = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.read_norm, self.read = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.think = FeedForward(width, intermediate_size)

    def forward(self, hidden: Tensor, frames: Tensor, attn_mask: Tensor) -> Tensor:
        own = self.own_norm(hidden)
        hidden = hidden + self.own(own, own, None)
        hidden = hidden + self.read(self.read_norm(hidden), frames, attn_mask)
        out: Tensor = hidden + self.think(hidden)
        return out
