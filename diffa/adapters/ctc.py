"""CTC compression: consecutive frames with the same label become one embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.adapters.layer_mixing import LayerMixer, frame_mask, masked_embeds
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class CTC(nn.Module):
    """Runs of frames with one most likely label, averaged by its probability (Gaido et al. 2021).

    A linear layer labels every frame; label 0 is the blank. A run of equal labels becomes one
    frame, weighted by the label's probability, then mapped linearly. The content sets how many
    there are: ``out_lengths`` is an upper bound.

    Args:
        num_labels: Labels of the CTC head, blank included; train it with a CTC loss on ``label``.
        keep_blanks: Embed runs of blanks too; a row of blanks alone always keeps one.
        mix_layers: Read a learned mixture of all encoder states instead of the last one.
    """

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        num_labels: int = 32,
        keep_blanks: bool = True,
        mix_layers: bool = False,
    ) -> None:
        super().__init__()
        if num_labels < 2:
            raise SpecError(f"num_labels must be at least 2 (blank and one more), got {num_labels}")
        self.keep_blanks = keep_blanks
        self.mixer = LayerMixer(source, mix_layers=mix_layers)
        self.label = nn.Linear(source.width, num_labels)
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return the most embeddings that ``lengths`` (B,) frames can give: one per frame."""
        return lengths

    def forward(self, features: Features) -> Embeds:
        """Embed the runs of true frames."""
        frames = self.mixer(features, self.label.weight.dtype)
        rows, longest, width = frames.shape
        if longest == 0:
            return Embeds(self.proj(frames), features.lengths.clone())
        probs, labels = self.label(frames).float().softmax(dim=-1).max(dim=-1)
        inside = frame_mask(features.lengths, longest)
        run, count = label_runs(labels, inside, keep_blanks=self.keep_blanks)
        weight = torch.where(run >= 0, probs, 0)[..., None]
        place = run.clamp(min=0)[..., None]
        # Average the frames of each run: sums (B, runs, width) over the runs' total weight.
        sums = frames.new_zeros(rows, longest, width, dtype=torch.float32)
        sums = sums.scatter_add(1, place.expand(-1, -1, width), weight * frames.float())
        mass = torch.zeros_like(sums[..., :1]).scatter_add(1, place, weight)
        merged = (sums / mass.clamp(min=1e-9))[:, : int(count.max())].to(frames.dtype)
        return masked_embeds(self.proj(merged), count)


def label_runs(labels: Tensor, inside: Tensor, *, keep_blanks: bool) -> tuple[Tensor, Tensor]:
    """Return the run (B, T) each frame belongs to, -1 for none, and how many there are (B,)."""
    members = inside if keep_blanks else inside & (labels != 0)
    # a row of blanks alone keeps them, as one run
    members = torch.where(members.any(dim=1, keepdim=True), members, inside)
    changed = torch.ones_like(inside)
    changed[:, 1:] = labels[:, 1:] != labels[:, :-1]
    starts = changed & members
    run = starts.cumsum(dim=1) - 1
    return torch.where(members, run, -1), starts.sum(dim=1)
