"""The frames that most adapters read: the encoder's last state, or a learned mixture of all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.types import Embeds, Features, FeatureSpec


class LayerMixer(nn.Module):
    """Select the encoder's last state, or mix all states with learned weights.

    The mixture is a sum weighted by a softmax and scaled (ELMo, Peters et al. 2018, eq. 1; the
    protocol of SUPERB).
    """

    def __init__(self, source: FeatureSpec, *, mix_layers: bool) -> None:
        super().__init__()
        self.mix_layers = mix_layers
        if mix_layers:
            self.weights = nn.Parameter(torch.zeros(source.layers + 1))
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Features, dtype: torch.dtype) -> Tensor:
        """Return frames (B, T, width), T the longest row's length, zero past each row's."""
        longest = int(features.lengths.max())
        inside = frame_mask(features.lengths, longest)[..., None]
        if not self.mix_layers:
            return torch.where(inside, features.states[-1][:, :longest].to(dtype), 0)
        # scale * sum over layers of softmax(weights)[layer] * state[layer]
        weights = self.scale * self.weights.softmax(dim=0)
        frames = torch.zeros((), dtype=dtype, device=inside.device)
        for weight, state in zip(weights, features.states, strict=True):
            frames = frames + weight * torch.where(inside, state[:, :longest].to(dtype), 0)
        return frames


def masked_embeds(values: Tensor, lengths: Tensor) -> Embeds:
    """Return embeddings (B, N, W) with zeros past each row's length (B,)."""
    inside = frame_mask(lengths, values.shape[1])[..., None]
    return Embeds(torch.where(inside, values, 0), lengths)


def frame_mask(lengths: Tensor, size: int) -> Tensor:
    """Return which of ``size`` places lie within each row's length, (B, size) bool."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]
