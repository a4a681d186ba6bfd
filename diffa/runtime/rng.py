"""SplitMix64 (Steele et al. 2014) on tensors: the hash behind every counter-based draw."""

from __future__ import annotations

from torch import Tensor

# The constants of SplitMix64 as signed 64-bit integers; products wrap, as intended.
GOLDEN_GAMMA = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift 64-bit integers right, filling with zeros instead of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """Return the SplitMix64 hash of 64-bit integers, one to one."""
    x = (x ^ shift_right(x, 30)) * _FIRST
    x = (x ^ shift_right(x, 27)) * _SECOND
    return x ^ shift_right(x, 31)
