"""A mixture of experts as the projector."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import LayerMixer, frame_mask
from diffa.errors import SpecError, check_at_least
from diffa.types import Embeds, Features, FeatureSpec


class Experts(nn.Module):
    """A mixture of two-layer networks over stacked frames (Shazeer et al. 2017, eq. 1-5, no noise).

    The experts with the largest router logits map each stack; a softmax over them weights the
    results. No expert has a capacity, so a row does not depend on its batch.

    Args:
        num_experts: Experts.
        num_experts_per_tok: Experts that map each embedding.
        stride: Frames stacked into one embedding.
        intermediate_size: Width of an expert's hidden layer.
        mix_layers: Read a learned mixture of all encoder states instead of the last one.
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
        check_at_least(
            1, num_experts=num_experts, stride=stride, intermediate_size=intermediate_size
        )
        if not 1 <= num_experts_per_tok <= num_experts:
            raise SpecError(
                f"num_experts_per_tok must lie between 1 and num_experts ({num_experts}), "
                f"got {num_experts_per_tok}"
            )
        self.stride, self.num_experts_per_tok, self.width = stride, num_experts_per_tok, width
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
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
        """Return how many embeddings come from ``lengths`` (B,) frames, rounded up."""
        return -(-lengths // self.stride)

    def forward(self, features: Features) -> Embeds:
        """Embed stacks of true frames, the last one filled with zeros."""
        lengths = self.out_lengths(features.lengths)
        frames = self.mixer(features, self.router.weight.dtype)
        longest = int(lengths.max())
        frames = F.pad(frames, (0, 0, 0, longest * self.stride - frames.shape[1]))
        stacked = rearrange(frames, "b (n s) d -> b n (s d)", s=self.stride)
        inside = frame_mask(lengths, longest)
        # Route true stacks only: padding must not load the experts.
        values = frames.new_zeros(*inside.shape, self.width)
        values[inside] = self._route(stacked[inside])
        return Embeds(values, lengths)

    def _route(self, stacks: Tensor) -> Tensor:
        """Map stacks of frames (M, stride * width), each by its own experts."""
        top_logits, top_experts = self.router(stacks).float().topk(self.num_experts_per_tok, dim=-1)
        shares = top_logits.softmax(dim=-1).to(stacks.dtype)
        out = stacks.new_zeros(len(stacks), self.width)
        # index_add keeps the order of experts, so a row's sum does not depend on its batch.
        for number, expert in enumerate(self.experts):
            row, rank = (top_experts == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(stacks[row]) * shares[row, rank, None])
        return out
