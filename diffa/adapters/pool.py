"""Average pooling and one linear map (Qwen2-Audio)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from diffa.adapters.layer_mixing import Reading, inside_of
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class Pool(nn.Module):
    """The mean of every ``stride`` frames, mapped linearly (Chu et al. 2024, Qwen2-Audio: two).

    A last stride that is not whole is the mean of the frames it has. ``mix_layers`` reads a learned
    mixture of all the encoder's states instead of the last one.
    """

    def __init__(
        self, source: FeatureSpec, width: int, *, stride: int = 2, mix_layers: bool = False
    ) -> None:
        super().__init__()
        if stride < 1:
            raise SpecError(f"stride must be at least 1, got {stride}")
        self.stride = stride
        self.reading = Reading(source, mix_layers=mix_layers)
        self.proj = nn.Linear(source.width, width)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: strides, begun or whole."""
        return -(-lengths // self.stride)

    def forward(self, features: Features) -> Embeds:
        """Embed the means of true frames."""
        lengths = self.out_lengths(features.lengths)
        frames = self.reading(features, self.proj.weight.dtype)
        most, step = int(lengths.max()), self.stride
        frames = F.pad(frames, (0, 0, 0, most * step - frames.shape[1]))
        sums = reduce(frames, "b (n s) d -> b n d", "sum", s=step)
        places = torch.arange(most, device=lengths.device) * step
        count = (features.lengths[:, None] - places).clamp(1, step)
        values = self.proj(sums / count[..., None].to(sums.dtype))
        return Embeds(torch.where(inside_of(lengths, most)[..., None], values, 0), lengths)
