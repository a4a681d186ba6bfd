"""Frame stacking and two linear layers (SLAM-LLM)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import Reading
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Linear(nn.Module):
    """Stacks ``stack`` frames of the last state and maps them through ``hidden`` units with a
    ReLU (Ma et al. 2024, SLAM-LLM). ``mix`` reads a learned mixture of all the encoder's states
    instead of the last one."""

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        stack: int = 5,
        hidden: int = 2048,
        mix: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("stack", stack), ("hidden", hidden)):
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        self.stack = stack
        self.reading = Reading(source, mix=mix)
        self.layers = nn.Sequential(
            nn.Linear(stack * source.width, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: whole stacks."""
        return lengths // self.stack

    def forward(self, features: Features) -> Embeds:
        """Embed the state that is read; frames that fill no whole stack are left out."""
        lengths = self.out_lengths(features.lengths)
        most = int(lengths.max())
        dtype = self.layers[0].weight.dtype
        frames = self.reading(features, dtype)[:, : most * self.stack]
        values = self.layers(rearrange(frames, "b (n s) d -> b n (s d)", s=self.stack))
        inside = torch.arange(most, device=values.device) < lengths[:, None]
        return Embeds(torch.where(inside[..., None], values, 0), lengths)
