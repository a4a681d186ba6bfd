"""Continuous integrate-and-fire: frames are summed until they weigh one embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.adapters.layer_mixing import Reading, inside_of
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class CIF(nn.Module):
    """Continuous integrate-and-fire (Dong and Xu 2020, sec. 3.1, with the scaling of sec. 3.2).

    Every frame gets a weight between 0 and 1 from a convolution over its neighbours; whenever
    the weights add up to one, the weighted sum of the frames since is fired. Weights are scaled
    so that a row fires one embedding per ``stride`` frames: the content decides where the
    borders lie, the length alone how many there are.
    """

    def __init__(
        self, source: FeatureSpec, width: int, *, stride: int = 4, mix_layers: bool = False
    ) -> None:
        super().__init__()
        if stride < 1:
            raise SpecError(f"stride must be at least 1, got {stride}")
        self.stride = stride
        self.reading = Reading(source, mix_layers=mix_layers)
        self.conv = nn.Conv1d(source.width, source.width, 3, padding=1)
        self.weight = nn.Linear(source.width, 1)
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings ``lengths`` (B,) frames fire: strides, begun or whole."""
        return -(-lengths // self.stride)

    def forward(self, features: Features) -> Embeds:
        """Fire the embeddings of true frames."""
        lengths = self.out_lengths(features.lengths)
        frames = self.reading(features, self.conv.weight.dtype)
        inside = inside_of(features.lengths, frames.shape[1])
        if frames.shape[1] == 0:
            return Embeds(self.proj(frames), lengths)
        heard = self.conv(frames.transpose(1, 2)).relu().transpose(1, 2)
        weights = self.weight(heard)[..., 0].float().sigmoid()
        # the floor keeps silence from being all of nothing when every weight vanishes
        weights = torch.where(inside, weights + 1e-4, 0)
        total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
        shares = fire(weights * lengths[:, None] / total, int(lengths.max()))
        values = self.proj((shares @ frames.float()).to(frames.dtype))
        there = inside_of(lengths, values.shape[1])[..., None]
        return Embeds(torch.where(there, values, 0), lengths)


def fire(weights: Tensor, count: int) -> Tensor:
    """Return how much of each frame's weight (B, T) goes to each embedding, (B, count, T).

    Frame t spans the stretch from the sum of weights before it to the sum with it; embedding n
    takes the part between n and n + 1. No loop over frames: the recursion of the paper's eq. 1-4
    in closed form.
    """
    end = weights.double().cumsum(dim=1)[:, None]
    begin = end - weights.double()[:, None]
    floor = torch.arange(count, device=weights.device, dtype=end.dtype)[None, :, None]
    overlap = torch.minimum(end, floor + 1) - torch.maximum(begin, floor)
    return overlap.clamp(min=0).to(weights.dtype)
