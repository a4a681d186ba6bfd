"""What adapters of one stream read: the encoder's last state, or a learned mixture of all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.types import Features, FeatureSpec


class Reading(nn.Module):
    """Frames (B, T, width) from features: the last state, or with ``mix_layers`` a sum over all states
    weighted by a softmax and scaled (ELMo, Peters et al. 2018, eq. 1; SUPERB's protocol)."""

    def __init__(self, source: FeatureSpec, *, mix_layers: bool) -> None:
        super().__init__()
        self.mix_layers = mix_layers
        if mix_layers:
            self.weights = nn.Parameter(torch.zeros(source.layers + 1))
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Features, dtype: torch.dtype) -> Tensor:
        """Return the frames up to the longest row's length, zero past each row's."""
        most = int(features.lengths.max())
        inside = inside_of(features.lengths, most)[..., None]
        if not self.mix_layers:
            return torch.where(inside, features.states[-1][:, :most].to(dtype), 0)
        shares = self.scale * self.weights.softmax(dim=0)
        frames = torch.zeros((), dtype=dtype, device=inside.device)
        for share, state in zip(shares, features.states, strict=True):
            frames = frames + share * torch.where(inside, state[:, :most].to(dtype), 0)
        return frames


def inside_of(lengths: Tensor, most: int) -> Tensor:
    """Return which of ``most`` places lie within each row's length, (B, most) bool."""
    return torch.arange(most, device=lengths.device) < lengths[:, None]
