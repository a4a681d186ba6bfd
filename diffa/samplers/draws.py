"""Random numbers that depend on (row's seed, step, slot) and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # the multipliers of splitmix64


def uniform(seeds: Tensor, step: Tensor, slots: Tensor, *, stream: int) -> Tensor:
    """Return float64 numbers in (0, 1), one for each of ``slots`` (B, K).

    A counter-based generator (splitmix64): the same for a row alone and in any batch, on any
    device. ``seeds`` and ``step`` are (B,); ``stream`` keeps different uses apart.
    """
    streams = torch.full_like(step, stream, dtype=torch.long) * _GOLDEN  # wraps, as intended
    key = _mix(_mix(seeds.long() + streams) + step.long() * _GOLDEN)
    bits = _mix(key[:, None] + slots.long() * _GOLDEN)
    return (_shift(bits, 11).double() + 0.5) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """Splitmix64's finaliser; int64 arithmetic wraps as it should."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """Shift right and bring in zeros, which int64 does not do by itself."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def categorical(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
    """Sample softmax(logits / temperature) by inverting its cumulative sum at ``draws``.

    logits (B, R, V), draws (B, R) in (0, 1). The sum runs in float64, because truncated uniforms
    in float32 silently lower the temperature (arXiv 2409.02908).
    """
    shares = torch.softmax(logits.float() / temperature, dim=-1).double().cumsum(dim=-1)
    target = (draws * shares[..., -1]).unsqueeze(-1)
    return (
        torch.searchsorted(shares, target, right=True).squeeze(-1).clamp(max=shares.shape[-1] - 1)
    )
