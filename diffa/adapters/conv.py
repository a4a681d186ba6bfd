"""DIFFA's semantic adapter: convolutions that shorten the encoder's last state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.adapters.layer_mixing import LayerMixer
from diffa.adapters.numbering import Numbering
from diffa.checkpoints import read as ckpt
from diffa.errors import SpecError, check_at_least
from diffa.types import Embeds, Features, FeatureSpec


class Conv(nn.Module):
    """Two convolutions, the second of stride ``stride``, and two linear layers (DIFFA).

    50 frames per second become 12.5 embeddings at the default stride.

    Args:
        stride: Frames per embedding.
        final_relu: Apply a ReLU before the last norm, as DIFFA does.
        mix_layers: Read a learned mixture of all encoder states instead of the last one. No
            published weights have it.
        word_numbers: Add embeddings of word numbers up to this one (``Numbering``). Default: none.
        checkpoint: Folder or Hub id of a DIFFA model (keys ``semantic_connector.*``).
        revision: Revision of the Hub repository. Default: the newest.
    """

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        stride: int = 4,
        final_relu: bool = True,
        mix_layers: bool = False,
        word_numbers: int = 0,
        checkpoint: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, stride=stride)
        if mix_layers and checkpoint is not None:
            raise SpecError(
                "mix_layers has no published weights: leave checkpoint or mix_layers out"
            )
        check_at_least(0, word_numbers=word_numbers)
        self.stride, self.final_relu = stride, final_relu
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
        inner = source.width
        self.conv = nn.Sequential(
            nn.Conv1d(inner, inner, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(inner, stride * inner, 3, stride=stride, padding=1),
        )
        self.linear_connector = nn.Sequential(
            nn.Linear(stride * inner, inner), nn.ReLU(), nn.Linear(inner, width)
        )
        self.numbering = Numbering(width, word_numbers) if word_numbers else None
        self.layernorm = nn.LayerNorm(width)
        if checkpoint is not None and not ckpt.is_meta():
            folder = ckpt.find_checkpoint(checkpoint, revision)
            ckpt.load_state(self, ckpt.read_weights(folder, "semantic_connector."), source=folder)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings come from ``lengths`` (B,) frames: whole strides."""
        return lengths // self.stride

    def forward(self, features: Features) -> Embeds:
        """Embed the true frames; frames past a row's length have no effect."""
        lengths = self.out_lengths(features.lengths)
        most = int(lengths.max())
        frames = self.mixer(features, self.layernorm.weight.dtype)[:, : most * self.stride]
        if most == 0:  # less than one stride of audio in every row
            return Embeds(frames.new_zeros(len(frames), 0, self.layernorm.weight.numel()), lengths)
        inside = torch.arange(frames.shape[1], device=frames.device) < (
            lengths[:, None] * self.stride
        )
        # Zero the padding before each convolution: width-3 kernels would read across the end.
        first, activation, second = self.conv
        hidden = torch.where(inside[:, None], rearrange(frames, "b t d -> b d t"), 0)
        hidden = torch.where(inside[:, None], activation(first(hidden)), 0)
        values = self.linear_connector(rearrange(second(hidden), "b d n -> b n d"))
        values = self.layernorm(F.relu(values) if self.final_relu else values)
        content, inside = None, inside[:, :: self.stride]
        if self.numbering is not None:
            content = values
            values = self.numbering(values, inside)
        return Embeds(torch.where(inside[..., None], values, 0), lengths, content)
