"""Frame stacking and two linear layers (SLAM-LLM)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import LayerMixer, masked_embeds
from diffa.errors import check_at_least
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
        check_at_least(1, stride=stride, intermediate_size=intermediate_size)
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
        return masked_embeds(values, lengths)
