"""Frame stacking and two linear layers (SLAM-LLM)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import LayerMixer, frame_mask
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Linear(nn.Module):
    """Stack frames and map them with two linear layers and a ReLU (SLAM-LLM, Ma et al. 2024).

    Args:
        stride: Frames stacked into one embedding.
        intermediate_size: Width of the hidden layer.
        mix_layers: Read a learned mixture of all encoder states instead of the last one.
    """

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
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
        self.layers = nn.Sequential(
            nn.Linear(stride * source.width, intermediate_size),
            nn.ReLU(),
            nn.Linear(intermediate_size, width),
        )

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames, rounded down."""
        return lengths // self.stride

    def forward(self, features: Features) -> Embeds:
        """Embed whole stacks of true frames."""
        lengths = self.out_lengths(features.lengths)
        longest = int(lengths.max())
        dtype = self.layers[0].weight.dtype
        frames = self.mixer(features, dtype)[:, : longest * self.stride]
        values = self.layers(rearrange(frames, "b (n s) d -> b n (s d)", s=self.stride))
        inside = frame_mask(lengths, longest)[..., None]
        return Embeds(torch.where(inside, values, 0), lengths)
