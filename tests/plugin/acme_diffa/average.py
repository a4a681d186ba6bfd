"""Average pooling over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Average(nn.Module):
    """Averages every ``stride`` frames of the last state and maps them to the backbone's width."""

    def __init__(self, source: FeatureSpec, width: int, *, stride: int = 4) -> None:
        super().__init__()
        if stride < 1:
            raise SpecError(f"stride must be at least 1, got {stride}")
        self.stride = stride
        self.out = nn.Linear(source.width, width)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: whole strides."""
        return lengths // self.stride

    def forward(self, features: Features) -> Embeds:
        """Embed the last state; frames that fill no whole stride are left out."""
        lengths = self.out_lengths(features.lengths)
        most = int(lengths.max())
        frames = features.states[-1][:, : most * self.stride].to(self.out.weight.dtype)
        values = self.out(frames.unflatten(1, (most, self.stride)).mean(dim=2))
        inside = torch.arange(most, device=values.device) < lengths[:, None]
        return Embeds(torch.where(inside[..., None], values, 0), lengths)
