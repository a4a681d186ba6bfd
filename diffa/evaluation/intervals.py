"""Uncertainty of a metric and of a difference: bootstrap, permutation and McNemar's test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffa.errors import DiffaError

_DRAWS = 2_000_000  # drawn indices held in memory at once
Values = Sequence[float] | NDArray[np.float64]


class PairedDifference(NamedTuple):
    """The difference of run B minus run A on the same items.

    Attributes:
        value: Metric of B minus metric of A.
        low, high: 95 % bootstrap interval of ``value``.
        p: Two-sided p value of the paired permutation test.
        mcnemar: Two-sided p value of McNemar's exact test; None unless items are right or wrong.
        only_a, only_b: Items that only A, or only B, answers correctly.
    """

    value: float
    low: float
    high: float
    p: float
    mcnemar: float | None
    only_a: int
    only_b: int


def import_scipy_stats() -> Any:
    """Return ``scipy.stats``; raises DiffaError if scipy is not installed."""
    try:
        return import_module("scipy.stats")
    except ImportError as error:
        raise DiffaError("scores need scipy: pip install 'diffa-audio[eval]'") from error


def ratio_of_sums(numerators: Values, denominators: Values) -> float:
    """Return sum(numerators) / sum(denominators); NaN if the denominator is 0."""
    total = float(np.sum(denominators))
    return float(np.sum(numerators)) / total if total else math.nan


def bootstrap_interval(
    numerators: Values, denominators: Values, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of ``ratio_of_sums`` over items."""
    if not len(numerators) or not np.sum(denominators):
        return math.nan, math.nan
    return _percentiles([numerators, denominators], _ratios, resamples, seed)


def paired_difference(
    a: tuple[Values, Values], b: tuple[Values, Values], *, resamples: int = 1000, seed: int = 0
) -> PairedDifference:
    """Compare numerators and denominators of run B with those of run A, item by item."""
    value = ratio_of_sums(*b) - ratio_of_sums(*a)
    if math.isnan(value):
        return PairedDifference(value, math.nan, math.nan, math.nan, None, 0, 0)
    (points_a, weights_a), (points_b, weights_b) = (
        [np.asarray(column, float) for column in run] for run in (a, b)
    )

    def statistic(*columns: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        top_a, bottom_a, top_b, bottom_b = columns
        difference: NDArray[np.float64] = _ratios(top_b, bottom_b, axis) - _ratios(
            top_a, bottom_a, axis
        )
        return difference

    columns = [points_a, weights_a, points_b, weights_b]
    low, high = _percentiles(columns, statistic, resamples, seed)
    binary = bool(
        np.isin([points_a, points_b], (0, 1)).all()
        and (np.array([weights_a, weights_b]) == 1).all()
    )
    only_a = int(np.sum(points_a > points_b)) if binary else 0
    only_b = int(np.sum(points_b > points_a)) if binary else 0
    p = permutation_test(points_b / weights_b.sum() - points_a / weights_a.sum(), seed=seed)
    exact = mcnemar_test(only_a, only_b) if binary else None
    return PairedDifference(value, low, high, p, exact, only_a, only_b)


def permutation_test(
    differences: NDArray[np.float64], *, resamples: int = 9999, seed: int = 0
) -> float:
    """Return the two-sided p value of a sum of paired differences under random signs.

    Exact if there are at most ``resamples`` combinations of signs, else by random draws
    (scipy.stats.permutation_test: twice the smaller tail).
    """
    nonzero = differences[differences != 0]
    if len(nonzero) < 2:
        return 1.0
    result = import_scipy_stats().permutation_test(
        (nonzero,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWS // len(nonzero)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def mcnemar_test(only_a: int, only_b: int) -> float:
    """Return the two-sided p value of McNemar's exact test on discordant items."""
    total = only_a + only_b
    return float(import_scipy_stats().binomtest(only_a, total).pvalue) if total else 1.0


def _ratios(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], axis: int
) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios: NDArray[np.float64] = numerators.sum(axis) / denominators.sum(axis)
    return ratios


def _percentiles(
    columns: Sequence[Values], statistic: Any, resamples: int, seed: int
) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of a statistic over resampled items."""
    data = [np.asarray(column, float) for column in columns]
    if len(data[0]) == 1:
        return (float(statistic(*data, axis=-1)),) * 2  # scipy refuses a single observation
    with warnings.catch_warnings():
        # scipy warns of resamples without a ratio (excluded items only): they are left out below.
        warnings.simplefilter("ignore")
        result = import_scipy_stats().bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _DRAWS // len(data[0])),
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = np.nanpercentile(result.bootstrap_distribution, [2.5, 97.5])
    return float(low), float(high)
