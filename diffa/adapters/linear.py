"""Frame stacking and two linear layers (SLAM-LLM)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import Reading
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Linear(nn.Module):
    """Stacks ``stride`` frames of the last state and maps them through ``intermediate_size`` units with a
    ReLU (Ma et al. 2024, SLAM-LLM). ``mix_layers`` reads a learned mixture of all the encoder's states
    instead of the last one."""

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        stride: int = 5,
        intermediate_size: int = 2048,
        mix_layers: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("stride", stride), ("intermediate_size", intermediate_size)):
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        self.stride = stride
        self.reading = Reading(source, mix_layers=mix_layers)
        self.layers = nn.Sequential(
            nn.Linear(stride * source.width, intermediate_size),
            nn.ReLU(),
            nn.Linear(intermediate_size, width),
        )

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: whole stacks."""
        return lengths // self.stride

    def forward(self, features: Features) -> Embeds:
        """Embed the state that is read; frames that fill no whole stack are left out."""
        lengths = self.out_lengths(features.lengths)
        most = int(lengths.max())
        dtype = self.layers[0].weight.dtype
        frames = self.reading(features, dtype)[:, : most * self.stride]
        values = self.layers(rearrange(frames, "b (n s) d -> b n (s d)", s=self.stride))
        inside = torch.arange(most, device=values.device) < lengths[:, None]
        return Embeds(torch.where(inside[..., None], values, 0), lengths)
