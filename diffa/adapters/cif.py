"""Continuous integrate-and-fire: sum frames until their weights add up to one embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.adapters.layer_mixing import LayerMixer, frame_mask, masked_embeds
from diffa.errors import check_at_least
from diffa.types import Embeds, Features, FeatureSpec


class CIF(nn.Module):
    """Continuous integrate-and-fire (Dong and Xu 2020, sec. 3.1, with the scaling of sec. 3.2).

    A convolution gives every frame a weight between 0 and 1. Whenever the weights add up to one,
    the weighted sum of the frames since the last embedding becomes the next one. The weights are
    scaled so that the length alone sets the number of embeddings, the content their borders.

    Args:
        stride: Frames per embedding, on average.
        mix_layers: Read a learned mixture of all encoder states instead of the last one.
    """

    def __init__(
        self, source: FeatureSpec, width: int, *, stride: int = 4, mix_layers: bool = False
    ) -> None:
        super().__init__()
        check_at_least(1, stride=stride)
        self.stride = stride
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
        self.conv = nn.Conv1d(source.width, source.width, 3, padding=1)
        self.weight = nn.Linear(source.width, 1)
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames, rounded up."""
        return -(-lengths // self.stride)

    def forward(self, features: Features) -> Embeds:
        """Embed the true frames."""
        lengths = self.out_lengths(features.lengths)
        frames = self.mixer(features, self.conv.weight.dtype)
        inside = frame_mask(features.lengths, frames.shape[1])
        if frames.shape[1] == 0:
            return Embeds(self.proj(frames), lengths)
        hidden = self.conv(frames.transpose(1, 2)).relu().transpose(1, 2)
        weights = self.weight(hidden)[..., 0].float().sigmoid()
        # The floor prevents a division of zero by zero where every weight vanishes.
        weights = torch.where(inside, weights + 1e-4, 0)
        total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
        shares = integrate_and_fire(weights * lengths[:, None] / total, int(lengths.max()))
        values = self.proj((shares @ frames.float()).to(frames.dtype))
        return masked_embeds(values, lengths)


def integrate_and_fire(weights: Tensor, count: int) -> Tensor:
    """Return how much of each frame's weight (B, T) goes to each embedding, (B, count, T).

    Frame t covers the interval from the sum of the weights before it to the sum with it, and
    embedding n the interval from n to n + 1; the result is their overlap. This is the recursion of
    the paper's eq. 1-4 in closed form.

        weights     |  .4  |  .4  |   .7     |  .5   |
        embeddings  |      0        |      1         |
    """
    end = weights.double().cumsum(dim=1)[:, None]
    begin = end - weights.double()[:, None]
    floor = torch.arange(count, device=weights.device, dtype=end.dtype)[None, :, None]
    overlap = torch.minimum(end, floor + 1) - torch.maximum(begin, floor)
    return overlap.clamp(min=0).to(weights.dtype)
