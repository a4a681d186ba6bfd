"""Noise times in (0, 1), one per row: independent, in antithetic pairs, or evenly spread.

A row's time depends on its own seed alone, so it is the same in any batch and on any rank. Rows
share a scheme through their seeds: the rows of a training step have consecutive seeds, so pairs are
antithetic, and low-discrepancy times are spread over all ranks. Under hashed seeds, every scheme
is independent.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffa.objectives.rng import row_uniform
from diffa.runtime.rng import GOLDEN_GAMMA, shift_right

TimeSampling = Literal["independent", "antithetic", "low_discrepancy"]

_HALF = -(1 << 63)
_PLASTIC = 0.7548776662466927  # 1 / plastic number: spreads the blocks of a row


def sample_times(scheme: TimeSampling, seeds: Tensor, block: Tensor | None = None) -> Tensor:
    """Return uniform times (B, 1), or (B, L) with one time per block.

    Args:
        scheme: ``independent``. ``antithetic``: seeds 2k and 2k + 1 get t and 1 - t.
            ``low_discrepancy``: seed s gets the fraction of s times the golden ratio, so any run
            of seeds is evenly spread (Kronecker's sequence), and so are the blocks of a row.
        seeds: (B, 1).
        block: Block of each token, (B, L).
    """
    if scheme == "low_discrepancy":
        bits = shift_right(seeds.to(torch.int64) * GOLDEN_GAMMA + _HALF, 41)
        base = (bits.to(torch.float32) + 0.5) * 2.0**-23
        if block is None:
            return base
        return (base.double() + block * _PLASTIC).frac().clamp(2.0**-24).float()
    # Counters below 0: tokens of the row use those from 1 on.
    counter = torch.full_like(seeds, -1) if block is None else -16 - block
    if scheme == "independent":
        return row_uniform(seeds, counter)
    first = row_uniform(seeds >> 1, counter)
    return torch.where((seeds & 1).bool(), 1 - first, first)
