"""A mixture of experts as the projector: each embedding is made by the few that suit it."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import Reading, inside_of
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Experts(nn.Module):
    """``num_experts_per_tok`` of ``num_experts`` two-layer maps of ``stride`` stacked frames, weighted by a softmax over
    those chosen (Shazeer et al. 2017, eq. 1-5, without noise).

    No expert has a capacity, so no row is dropped for another's sake. ``mix_layers`` reads a learned
    mixture of all the encoder's states.
    """

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        stride: int = 4,
        intermediate_size: int = 2048,
        mix_layers: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_experts", num_experts),
            ("stride", stride),
            ("intermediate_size", intermediate_size),
        ):
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        if not 1 <= num_experts_per_tok <= num_experts:
            raise SpecError(
                f"num_experts_per_tok must lie between 1 and num_experts ({num_experts}), "
                f"got {num_experts_per_tok}"
            )
        self.stride, self.num_experts_per_tok, self.width = stride, num_experts_per_tok, width
        self.reading = Reading(source, mix_layers=mix_layers)
        inner = stride * source.width
        self.router = nn.Linear(inner, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inner, intermediate_size),
                nn.GELU(),
                nn.Linear(intermediate_size, width),
            )
            for _ in range(num_experts)
        )

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: stacks, begun or whole."""
        return -(-lengths // self.stride)

    def forward(self, features: Features) -> Embeds:
        """Embed stacks of true frames, the last one filled with zeros."""
        lengths = self.out_lengths(features.lengths)
        frames = self.reading(features, self.router.weight.dtype)
        most = int(lengths.max())
        frames = F.pad(frames, (0, 0, 0, most * self.stride - frames.shape[1]))
        stacked = rearrange(frames, "b (n s) d -> b n (s d)", s=self.stride)
        there = inside_of(lengths, most)
        values = frames.new_zeros(*there.shape, self.width)
        values[there] = self._mixed(stacked[there])
        return Embeds(values, lengths)

    def _mixed(self, rows: Tensor) -> Tensor:
        """Map rows (M, inner), each by its experts alone."""
        best, chosen = self.router(rows).float().topk(self.num_experts_per_tok, dim=-1)
        shares = best.softmax(dim=-1).to(rows.dtype)
        out = rows.new_zeros(len(rows), self.width)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(rows[row]) * shares[row, place, None])
        return out
