"""Uniform draws keyed by a row's own seed: the same on any device and in any batch.

A counter-based generator (the finaliser of SplitMix64, Steele et al. 2014) instead of a stream:
draw k of a row depends on (seed, k) alone, so neither batch mates nor padding can shift it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The constants of SplitMix64 as signed 64-bit integers; products wrap, as intended.
_GOLDEN = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right without carrying the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(x: Tensor) -> Tensor:
    """Scramble 64-bit integers one to one."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniform(seeds: Tensor, counter: Tensor) -> Tensor:
    """Return float32 draws strictly between 0 and 1 for seeds and counters that broadcast."""
    state = mixed(seeds.to(torch.int64) * _GOLDEN + _GOLDEN)
    bits = _shifted(mixed(state + counter.to(torch.int64) * _GOLDEN), 41)
    # 23 bits and a half: the largest float32 below 1 is 1 - 2^-24
    return (bits.to(torch.float32) + 0.5) * 2.0**-23
