"""The scrambling behind every counter-based draw: SplitMix64 (Steele et al. 2014) on tensors."""

from __future__ import annotations

from torch import Tensor

# The constants of SplitMix64 as signed 64-bit integers; products wrap, as intended.
GOLDEN_GAMMA = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right without carrying the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """Scramble 64-bit integers one to one."""
    x = (x ^ shift_right(x, 30)) * _FIRST
    x = (x ^ shift_right(x, 27)) * _SECOND
    return x ^ shift_right(x, 31)
