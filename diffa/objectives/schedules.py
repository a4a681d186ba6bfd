"""Noise schedules: the share of an answer that is masked at time t in (0, 1), and its slope.

With level(t) = 1 - alpha(t), the weight of the bound is w(t) = -alpha'(t) / (1 - alpha(t))
= slope(t) / level(t) (MD4, arXiv 2406.04329, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffa.errors import SpecError, suggest

# Total noise at t = 0 and t = 1 of the geometric schedule (MD4, table 1).
_SIGMA_MIN, _SIGMA_MAX = 1e-5, 20.0


class NoiseSchedule(NamedTuple):
    """A noise schedule.

    Attributes:
        level: Masked share at time t, from 0 to 1.
        slope: Derivative of ``level``.
    """

    level: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _linear() -> NoiseSchedule:
    """alpha = 1 - t (LLaDA, DIFFA; MDLM's log-linear schedule)."""
    return NoiseSchedule(lambda t: t.clone(), torch.ones_like)


def _cosine() -> NoiseSchedule:
    """alpha = 1 - cos(pi/2 (1 - t)), so the level is sin(pi/2 t) (MaskGIT, MD4)."""
    half = math.pi / 2
    return NoiseSchedule(lambda t: torch.sin(half * t), lambda t: half * torch.cos(half * t))


def _polynomial(power: float) -> NoiseSchedule:
    """alpha = 1 - t^power (MD4)."""
    return NoiseSchedule(lambda t: t**power, lambda t: power * t ** (power - 1.0))


def _geometric() -> NoiseSchedule:
    """alpha = exp(-sigma), sigma geometric from 1e-5 to 20, rescaled so that alpha(1) = 0 (MD4)."""
    ratio = math.log(_SIGMA_MAX / _SIGMA_MIN)
    scale = math.exp(-_SIGMA_MIN) / (math.exp(-_SIGMA_MIN) - math.exp(-_SIGMA_MAX))

    def level(t: Tensor) -> Tensor:
        return -scale * torch.expm1(_SIGMA_MIN - _SIGMA_MIN * torch.exp(ratio * t))

    def slope(t: Tensor) -> Tensor:
        sigma = _SIGMA_MIN * torch.exp(ratio * t)
        return scale * ratio * sigma * torch.exp(_SIGMA_MIN - sigma)

    return NoiseSchedule(level, slope)


def noise_schedule(name: str, power: float = 2.0) -> NoiseSchedule:
    """Return a schedule by name; only ``polynomial`` uses ``power``."""
    if power <= 0:
        raise SpecError(f"power must be above 0, got {power}")
    schedules: dict[str, Callable[[], NoiseSchedule]] = {
        "linear": _linear,
        "cosine": _cosine,
        "geometric": _geometric,
        "polynomial": lambda: _polynomial(power),
    }
    if name not in schedules:
        raise SpecError(f"unknown schedule {name!r}{suggest(name, schedules)}")
    return schedules[name]()


def floor_level(level: Tensor, eps: float) -> Tensor:
    """Return (1 - eps) level + eps, LLaDA's p_mask (eps = 1e-3)."""
    return (1.0 - eps) * level + eps
