"""Means over seeds with Student's t intervals, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from diffa.evaluation.intervals import import_scipy_stats


class MeanInterval(NamedTuple):
    """A mean, half the width of its 95 % interval (None for a single value), and the count."""

    mean: float
    half: float | None
    n: int

    def text(self) -> str:
        """Return mean and half width with two significant digits of the half width."""
        if self.half is None:
            return f"{self.mean:.4g}"
        digits = 3 if not self.half else max(0, 1 - math.floor(math.log10(self.half)))
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"

    def bounds(self) -> tuple[float, float] | None:
        """Return the ends of the interval; None for a single value."""
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Return the mean of independent values with Student's 95 % interval."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return MeanInterval(mean, None, n)
    quantile = float(import_scipy_stats().t.ppf(0.975, n - 1))
    return MeanInterval(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


def paired_interval(values: dict[int, float], others: dict[int, float]) -> MeanInterval | None:
    """Return the mean difference over the seeds that both have; None if they share no seed."""
    shared = sorted(values.keys() & others.keys())
    return mean_interval([values[seed] - others[seed] for seed in shared]) if shared else None
