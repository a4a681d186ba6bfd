"""CTC compression: consecutive frames that say the same become one embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.adapters.layer_mixing import Reading, inside_of
from diffa.errors import SpecError
from diffa.types import Embeds, Features, FeatureSpec


class CTC(nn.Module):
    """Runs of frames with one most likely label, averaged by its probability (Gaido et al. 2021).

    A linear layer labels every frame (``num_labels`` of them, the blank being the first); a run of
    equal labels becomes one frame, weighted by the label's probability, then mapped linearly.
    How many there are depends on what is said: ``out_lengths`` is the most there can be.

    Args:
        num_labels: of the CTC head, blank included; train it with a CTC loss on ``label``.
        keep_blanks: whether runs of blanks become embeddings too; a row of blanks alone keeps one.
        mix_layers: read a learned mixture of all the encoder's states.
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
        self.reading = Reading(source, mix_layers=mix_layers)
        self.label = nn.Linear(source.width, num_labels)
        self.proj = nn.Sequential(nn.LayerNorm(source.width), nn.Linear(source.width, width))

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return the most embeddings that ``lengths`` (B,) frames can give: one for each."""
        return lengths

    def forward(self, features: Features) -> Embeds:
        """Embed the runs of true frames."""
        frames = self.reading(features, self.label.weight.dtype)
        rows, most, wide = frames.shape
        if most == 0:
            empty = self.proj(frames)
            return Embeds(empty, features.lengths.clone())
        chance, labels = self.label(frames).float().softmax(dim=-1).max(dim=-1)
        inside = inside_of(features.lengths, most)
        run, count = runs(labels, inside, keep_blanks=self.keep_blanks)
        weight = torch.where(run >= 0, chance, 0)[..., None]
        place = run.clamp(min=0)[..., None]
        sums = frames.new_zeros(rows, most, wide, dtype=torch.float32)
        sums = sums.scatter_add(1, place.expand(-1, -1, wide), weight * frames.float())
        mass = torch.zeros_like(sums[..., :1]).scatter_add(1, place, weight)
        longest = int(count.max())
        merged = (sums / mass.clamp(min=1e-9))[:, :longest].to(frames.dtype)
        there = inside_of(count, longest)[..., None]
        return Embeds(torch.where(there, self.proj(merged), 0), count)


def runs(labels: Tensor, inside: Tensor, *, keep_blanks: bool) -> tuple[Tensor, Tensor]:
    """Return the run (B, T) each frame belongs to, -1 for none, and how many there are (B,)."""
    kept = inside if keep_blanks else inside & (labels != 0)
    # a row that would vanish keeps its blanks as one run
    kept = torch.where(kept.any(dim=1, keepdim=True), kept, inside)
    changed = torch.ones_like(inside)
    changed[:, 1:] = labels[:, 1:] != labels[:, :-1]
    begins = changed & kept
    run = begins.cumsum(dim=1) - 1
    return torch.where(kept, run, -1), begins.sum(dim=1)
