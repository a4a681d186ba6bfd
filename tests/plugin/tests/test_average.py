"""The adapter keeps to diffa's conformance suite."""

import pytest
from acme_diffa.average import Average

from diffa.errors import SpecError
from diffa.testing import AdapterSuite


class TestAverage(AdapterSuite):
    name = "average"


class TestAverageOfAnotherStride(AdapterSuite):
    name = "acme-diffa:average"
    options = {"stride": 3}


def test_a_stride_of_zero_is_refused():
    with pytest.raises(SpecError, match="stride must be at least 1, got 0"):
        Average(AdapterSuite.sources[0], 8, stride=0)
