"""A mixture of experts as the projector: each embedding is made by the few that suit it."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import Reading, inside_of
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Experts(nn.Module):
    """``top`` of ``experts`` two-layer maps of ``stack`` stacked frames, weighted by a softmax over
    those chosen (Shazeer et al. 2017, eq. 1-5, without noise).

    No expert has a capacity, so no row is dropped for another's sake. ``mix`` reads a learned
    mixture of all the encoder's states.
    """

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        experts: int = 4,
        top: int = 2,
        stack: int = 4,
        hidden: int = 2048,
        mix: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("experts", experts), ("stack", stack), ("hidden", hidden)):
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        if not 1 <= top <= experts:
            raise SpecError(f"top must lie between 1 and the {experts} experts, got {top}")
        self.stack, self.top, self.width = stack, top, width
        self.reading = Reading(source, mix=mix)
        inner = stack * source.width
        self.router = nn.Linear(inner, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(inner, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: stacks, begun or whole."""
        return -(-lengths // self.stack)

    def forward(self, features: Features) -> Embeds:
        """Embed stacks of true frames, the last one filled with zeros."""
        lengths = self.out_lengths(features.lengths)
        frames = self.reading(features, self.router.weight.dtype)
        most = int(lengths.max())
        frames = F.pad(frames, (0, 0, 0, most * self.stack - frames.shape[1]))
        stacked = rearrange(frames, "b (n s) d -> b n (s d)", s=self.stack)
        there = inside_of(lengths, most)
        values = frames.new_zeros(*there.shape, self.width)
        values[there] = self._mixed(stacked[there])
        return Embeds(values, lengths)

    def _mixed(self, rows: Tensor) -> Tensor:
        """Map rows (M, inner), each by its experts alone."""
        best, chosen = self.router(rows).float().topk(self.top, dim=-1)
        shares = best.softmax(dim=-1).to(rows.dtype)
        out = rows.new_zeros(len(rows), self.width)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(rows[row]) * shares[row, place, None])
        return out
