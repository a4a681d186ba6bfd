"""Times in (0, 1), one per row: independent, in opposite pairs, or spread evenly over rows.

A row's time depends on its own seed alone, whatever the scheme, so it is the same in any batch
and on any rank. Rows share a scheme through their seeds: with consecutive ones, as the rows of a
step have where a run numbers them, pairs are opposite and times spread over all ranks from the
one offset that the first seed is. Under seeds that are hashes every scheme is independent.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffa.objectives.rng import uniform
from diffa.runtime.rng import GOLDEN_GAMMA, shift_right

Levels = Literal["independent", "antithetic", "low_discrepancy"]

_HALF = -(1 << 63)
_PLASTIC = 0.7548776662466927  # 1 over the plastic number: spreads blocks within a row


def times(levels: Levels, seeds: Tensor, block: Tensor | None = None) -> Tensor:
    """Return uniform times (B, 1) for ``seeds`` (B, 1), or (B, L) for the blocks of tokens (B, L).

    ``antithetic``: seeds 2k and 2k + 1 get t and 1 - t. ``low_discrepancy``: seed s gets the fraction of
    s times the golden ratio, so any run of seeds is spread evenly (Kronecker's sequence); blocks
    of a row are spread alike. ``independent`` blocks have draws of their own.
    """
    if levels == "low_discrepancy":
        bits = shift_right(seeds.to(torch.int64) * GOLDEN_GAMMA + _HALF, 41)
        base = (bits.to(torch.float32) + 0.5) * 2.0**-23
        if block is None:
            return base
        return (base.double() + block * _PLASTIC).frac().clamp(2.0**-24).float()
    counter = torch.full_like(seeds, -1) if block is None else -16 - block
    if levels == "independent":
        return uniform(seeds, counter)
    drawn = uniform(seeds >> 1, counter)
    return torch.where((seeds & 1).bool(), 1 - drawn, drawn)
