"""An adapter that averages frames and maps them to the backbone's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Part(nn.Module):
    """The mean of every ``stride`` frames of the last state, mapped linearly."""

    def __init__(self, source: FeatureSpec, width: int, *, stride: int = 4) -> None:
        super().__init__()
        if stride < 1:
            raise SpecError(f"stride must be at least 1, got {stride}")
        self.stride = stride
        self.proj = nn.Linear(source.width, width)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: whole strides."""
        return lengths // self.stride

    def forward(self, features: Features) -> Embeds:
        """Embed true frames (B, T, D) as (B, N, W), zero past each row's length."""
        lengths = self.out_lengths(features.lengths)
        most = int(lengths.max())
        frames = features.states[-1][:, : most * self.stride].to(self.proj.weight.dtype)
        stacked = frames.reshape(len(frames), most, self.stride, -1)
        values = self.proj(stacked.mean(dim=2))
        inside = torch.arange(most, device=values.device) < lengths[:, None]
        return Embeds(torch.where(inside[..., None], values, 0), lengths)
