"""Average pooling and one linear map (Qwen2-Audio)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from diffa.adapters.layer_mixing import LayerMixer, masked_embeds
from diffa.errors import check_at_least
from diffa.types import Embeds, Features, FeatureSpec


class Pool(nn.Module):
    """Average every ``stride`` frames and map the mean linearly (Qwen2-Audio, Chu et al. 2024).

    An incomplete last stride is the mean of the frames it has.

    Args:
        stride: Frames averaged into one embedding.
        mix_layers: Read a learned mixture of all encoder states instead of the last one.
    """

    def __init__(
        self, source: FeatureSpec, width: int, *, stride: int = 2, mix_layers: bool = False
    ) -> None:
        super().__init__()
        check_at_least(1, stride=stride)
        self.stride = stride
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
        self.proj = nn.Linear(source.width, width)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames, rounded up."""
        return -(-lengths // self.stride)

    def forward(self, features: Features) -> Embeds:
        """Embed the means of the true frames."""
        lengths = self.out_lengths(features.lengths)
        frames = self.mixer(features, self.proj.weight.dtype)
        longest, step = int(lengths.max()), self.stride
        frames = F.pad(frames, (0, 0, 0, longest * step - frames.shape[1]))
        # Sums and true counts, so that padding does not lower an incomplete stride's mean.
        sums = reduce(frames, "b (n s) d -> b n d", "sum", s=step)
        starts = torch.arange(longest, device=lengths.device) * step
        count = (features.lengths[:, None] - starts).clamp(1, step)
        values = self.proj(sums / count[..., None].to(sums.dtype))
        return masked_embeds(values, lengths)
