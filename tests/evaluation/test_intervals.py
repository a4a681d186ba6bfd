"""Laws of the bootstrap and of the paired tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffa.errors import DiffaError
from diffa.evaluation import intervals
from diffa.evaluation.intervals import (
    bootstrap_interval,
    mcnemar_test,
    paired_difference,
    permutation_test,
)

right_or_wrong = st.lists(st.integers(0, 1), min_size=1, max_size=30)


@given(right_or_wrong, st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_an_interval_lies_in_the_range_of_its_metric_and_repeats_with_its_seed(hits, seed):
    ones = [1] * len(hits)
    low, high = bootstrap_interval(hits, ones, resamples=50, seed=seed)
    assert 0 <= low <= high <= 1
    assert bootstrap_interval(hits, ones, resamples=50, seed=seed) == (low, high)


@given(right_or_wrong)
@settings(max_examples=15, deadline=None)
def test_a_run_does_not_differ_from_itself(hits):
    columns = (hits, [1] * len(hits))
    result = paired_difference(columns, columns, resamples=20)
    assert (result.value, result.low, result.high, result.p, result.mcnemar) == (0, 0, 0, 1, 1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=12))
@settings(max_examples=15, deadline=None)
def test_exchanging_two_runs_changes_the_sign_and_no_p_value(pairs):
    ones = [1] * len(pairs)
    a, b = (([pair[i] for pair in pairs], ones) for i in (0, 1))
    there, back = paired_difference(a, b, resamples=20), paired_difference(b, a, resamples=20)
    assert there.value == -back.value
    assert there.p == pytest.approx(back.p) and there.mcnemar == pytest.approx(back.mcnemar)
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)


def test_the_permutation_test_of_binary_differences_is_mcnemars():
    # With equal steps, a sum of random signs is a binomial count.
    differences = np.array([1.0] * 9 + [-1.0] * 2)
    assert permutation_test(differences) == pytest.approx(mcnemar_test(2, 9))


def test_excluded_items_are_left_out_of_the_resamples():
    low, high = bootstrap_interval([1, 0, 0, 0], [1, 0, 0, 0], resamples=200)
    assert (low, high) == (1, 1)  # the only item that counts is right
    assert all(map(math.isnan, bootstrap_interval([0, 0], [0, 0])))


def test_the_interval_of_one_item_is_its_value():
    assert bootstrap_interval([3], [4]) == (0.75, 0.75)


def test_a_missing_scipy_names_the_extra(monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(intervals, "import_module", fail)
    with pytest.raises(DiffaError, match=r"pip install 'diffa-audio\[eval\]'"):
        bootstrap_interval([1, 0], [1, 1])
