"""Noise schedules: what share of an answer is masked at time t in (0, 1), and its slope.

With level(t) = 1 - alpha(t) the weight of the bound is w(t) = -alpha'(t) / (1 - alpha(t))
= slope(t) / level(t) (MD4, 2406.04329, eq. 5). Nothing else in diffa knows a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffa.errors import SpecError, suggest

# Total noise at both ends of the geometric schedule (MD4, table 1).
_QUIET, _LOUD = 1e-5, 20.0


class Schedule(NamedTuple):
    """``level(t)`` rises from 0 to 1 with t; ``slope(t)`` is its derivative."""

    level: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def linear() -> Schedule:
    """alpha = 1 - t: every level equally often (LLaDA, DIFFA; MDLM's log-linear)."""
    return Schedule(lambda t: t.clone(), torch.ones_like)


def cosine() -> Schedule:
    """alpha = 1 - cos(pi/2 (1 - t)), so the level is sin(pi/2 t) (MaskGIT, MD4)."""
    half = math.pi / 2
    return Schedule(lambda t: torch.sin(half * t), lambda t: half * torch.cos(half * t))


def polynomial(power: float) -> Schedule:
    """alpha = 1 - t^power."""
    return Schedule(lambda t: t**power, lambda t: power * t ** (power - 1.0))


def geometric() -> Schedule:
    """alpha = exp(-sigma), sigma geometric from 1e-5 to 20, rescaled to end at 0."""
    ratio = math.log(_LOUD / _QUIET)
    scale = math.exp(-_QUIET) / (math.exp(-_QUIET) - math.exp(-_LOUD))

    def level(t: Tensor) -> Tensor:
        return -scale * torch.expm1(_QUIET - _QUIET * torch.exp(ratio * t))

    def slope(t: Tensor) -> Tensor:
        sigma = _QUIET * torch.exp(ratio * t)
        return scale * ratio * sigma * torch.exp(_QUIET - sigma)

    return Schedule(level, slope)


def named(name: str, power: float = 2.0) -> Schedule:
    """Return a schedule by name; ``power`` is read by the polynomial one only."""
    if power <= 0:
        raise SpecError(f"power must be above 0, got {power}")
    made = {"linear": linear, "cosine": cosine, "geometric": geometric}
    if name == "polynomial":
        return polynomial(power)
    if name not in made:
        raise SpecError(f"unknown schedule {name!r}{suggest(name, [*made, 'polynomial'])}")
    return made[name]()


def alpha(schedule: Schedule, t: Tensor) -> Tensor:
    """Share of the answer still visible at time t."""
    return 1.0 - schedule.level(t)


def weight(schedule: Schedule, t: Tensor) -> Tensor:
    """w(t) = -alpha'(t) / (1 - alpha(t))."""
    return schedule.slope(t) / schedule.level(t)


def floored(level: Tensor, eps: float) -> Tensor:
    """Keep a level above the noise floor: (1 - eps) level + eps (LLaDA's p_mask, eps 1e-3)."""
    return (1.0 - eps) * level + eps
