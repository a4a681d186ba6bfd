"""Uniform numbers keyed by a row's own seed: the same on any device and in any batch.

Number k of a row depends on (seed, k) alone, so neither other rows nor padding can change it. The
generator is counter-based: the finaliser of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffa.runtime.rng import GOLDEN_GAMMA, shift_right, splitmix64


def row_uniform(seeds: Tensor, counter: Tensor) -> Tensor:
    """Return float32 numbers strictly between 0 and 1 for seeds and counters that broadcast."""
    state = splitmix64(seeds.to(torch.int64) * GOLDEN_GAMMA + GOLDEN_GAMMA)
    bits = shift_right(splitmix64(state + counter.to(torch.int64) * GOLDEN_GAMMA), 41)
    # 23 bits and a half: the largest value is 1 - 2^-24, the largest float32 below 1.
    return (bits.to(torch.float32) + 0.5) * 2.0**-23
