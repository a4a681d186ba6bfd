"""Random numbers that depend on (row's seed, step, slot) and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from diffa.runtime.rng import GOLDEN_GAMMA, shift_right, splitmix64


def uniform(seeds: Tensor, step: Tensor, slots: Tensor, *, stream: int) -> Tensor:
    """Return float64 numbers in (0, 1), one for each of ``slots`` (B, K).

    A counter-based generator (splitmix64): the same for a row alone and in any batch, on any
    device. ``seeds`` and ``step`` are (B,); ``stream`` keeps different uses apart.
    """
    streams = torch.full_like(step, stream, dtype=torch.long) * GOLDEN_GAMMA  # wraps, as intended
    key = splitmix64(
        splitmix64(seeds.long() + streams + GOLDEN_GAMMA)
        + step.long() * GOLDEN_GAMMA
        + GOLDEN_GAMMA
    )
    bits = splitmix64(key[:, None] + slots.long() * GOLDEN_GAMMA + GOLDEN_GAMMA)
    return (shift_right(bits, 11).double() + 0.5) * 2.0**-53


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
