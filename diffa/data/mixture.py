"""The order of training samples: a pure function of seed and position, so any step can resume.

A stage is one long sequence of positions. Position p belongs to epoch p // size, and everything
about it (which row, its corruption, its augmentation) follows from (seed, epoch, row).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from diffa.data.samples import DataError, Source, TimedSource, derive_seed

_POOL = 64  # batches that are sorted by length together


class DrawnRow(NamedTuple):
    """One position of a stage: which source and row, in which epoch, and its seed."""

    source: int
    row: int
    epoch: int
    seed: int


class Mixture:
    """Several sources, mixed by weight and shuffled anew in every epoch.

    Args:
        sources: what to draw from.
        weights: how often each source's rows pass in one epoch (0.05: another twentieth of them
            every epoch; 2: all of them twice).
        batch: samples of one optimiser step; an epoch is a whole number of steps.
        micro: samples that pass together, grouped by length if ``grouped``.
        seed: of the order and of every sample's own seed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        batch: int,
        micro: int,
        grouped: bool = False,
        seed: int = 0,
    ) -> None:
        if batch % micro:
            raise DataError(f"{batch} samples per step are no whole number of batches of {micro}")
        self.sources, self.seed, self.micro, self.grouped = list(sources), seed, micro, grouped
        sizes = [len(source) for source in sources]
        for source, size in zip(sources, sizes, strict=True):
            if size == 0:
                raise DataError(f"{source!r} has no samples")
        self.shares = _shares(sizes, list(weights), batch)
        # Two epochs: workers near a boundary ask for both. Everything follows from the seed, so a
        # resumed run and every worker draw the same order without sharing any state.
        self._order = lru_cache(maxsize=2)(self._draw_epoch)
        self._permutation = lru_cache(maxsize=2 * len(sizes))(self._shuffle)

    @property
    def size(self) -> int:
        """Samples of one epoch."""
        return sum(self.shares)

    def draw(self, position: int) -> DrawnRow:
        """Return what stands at a position of the stage, counted from 0 over all epochs."""
        # A position alone decides the row: resuming at step n needs no replay.
        epoch, at = divmod(position, self.size)
        source, row = self._order(epoch)[at]
        # consecutive over all ranks, as objectives that spread their levels over a step want it;
        # the first one is even, so that pairs stand in one batch
        first = derive_seed(self.seed, epoch) >> 1 << 1
        return DrawnRow(source, row, epoch, (first + at) % (1 << 63))

    def _draw_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """Return (source, row) for every position of an epoch."""
        rows: list[tuple[int, int]] = []
        for source, share in enumerate(self.shares):
            # A weight below 1 goes through the source over several epochs, one above 1 repeats it.
            rows += [(source, self._row(source, epoch * share + i)) for i in range(share)]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "order"))
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        return self._group(rows, generator) if self.grouped else rows

    def _row(self, source: int, at: int) -> int:
        """Return a row of a source; every row comes once before any comes again."""
        cycle, index = divmod(at, len(self.sources[source]))
        return int(self._permutation(source, cycle)[index])

    def _shuffle(self, source: int, cycle: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, source, cycle, "rows"))
        return torch.randperm(len(self.sources[source]), generator=generator)

    def _group(
        self, rows: list[tuple[int, int]], generator: torch.Generator
    ) -> list[tuple[int, int]]:
        """Sort pools of batches by length, then shuffle the batches."""
        # Sorting within pools, not over the epoch, keeps batches random enough.
        span = self.micro * _POOL
        pools = [sorted(rows[i : i + span], key=self._seconds) for i in range(0, len(rows), span)]
        ordered = [row for pool in pools for row in pool]
        starts = range(0, len(ordered), self.micro)
        batches = [ordered[i : i + self.micro] for i in starts]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [row for b in shuffled for row in batches[b]]

    def _seconds(self, place: tuple[int, int]) -> float:
        source, index = self.sources[place[0]], place[1]
        return source.seconds(index) if isinstance(source, TimedSource) else 0.0


def _shares(sizes: list[int], weights: list[float], batch: int) -> list[int]:
    """Return how many samples of each source make an epoch of whole steps."""
    if len(sizes) != len(weights) or not sizes:
        raise DataError(f"{len(sizes)} sources need {len(sizes)} weights, got {len(weights)}")
    for weight in weights:
        if not weight > 0:
            raise DataError(f"a source's weight must be above 0, got {weight}")
    shares = [max(1, round(w * n)) for w, n in zip(weights, sizes, strict=True)]
    steps = max(1, round(sum(shares) / batch))
    # Rounding to whole steps is taken from the largest source, which notices it least.
    largest = max(range(len(shares)), key=shares.__getitem__)
    rest = sum(shares) - shares[largest]
    while steps * batch <= rest:  # tiny epochs: one more step rather than a source left out
        steps += 1
    shares[largest] = steps * batch - rest
    return shares
