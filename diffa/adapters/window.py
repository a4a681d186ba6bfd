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
    """``queries`` for every window of ``seconds`` of frames (Tang et al. 2024, SALMONN, sec. 3.1).

    The same queries read every window of the last state, so their number grows with the audio
    and their order is time's. SALMONN uses 1 query, Whisper-LLaDA (Li et al. 2025) 4.

    Args:
        queries: per window.
        seconds: of a window; SALMONN's 0.333 s are 17 frames of Whisper.
        depth: layers of self-attention, cross-attention and feed-forward.
        ffn: width of the feed-forward.
        dropout: of the attention weights.
        mix: read a learned mixture of all the encoder's states.
    """

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        queries: int = 1,
        seconds: float = 1 / 3,
        depth: int = 2,
        ffn: int = 3072,
        dropout: float = 0.1,
        mix: bool = False,
    ) -> None:
        super().__init__()
        check(source.width, source.heads, dropout, queries=queries, depth=depth, ffn=ffn)
        if not 0 < seconds < 1e6:
            raise SpecError(f"seconds must be positive and finite, got {seconds}")
        self.frames = max(1, round(seconds * source.rate))
        self.reading = Reading(source, mix=mix)
        self.queries = bank(queries, source.width)
        self.layers = nn.ModuleList(_Layer(source, ffn, dropout) for _ in range(depth))
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

    def __init__(self, source: FeatureSpec, ffn: int, dropout: float) -> None:
        super().__init__()
        width, heads = source.width, source.heads
        self.own_norm, self.own = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.read_norm, self.read = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.think = FeedForward(width, ffn)

    def forward(self, hidden: Tensor, frames: Tensor, attn_mask: Tensor) -> Tensor:
        own = self.own_norm(hidden)
        hidden = hidden + self.own(own, own, None)
        hidden = hidden + self.read(self.read_norm(hidden), frames, attn_mask)
        out: Tensor = hidden + self.think(hidden)
        return out
