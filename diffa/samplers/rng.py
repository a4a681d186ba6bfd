"""Random numbers that depend on (row's seed, step, slot) and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from diffa.runtime.rng import GOLDEN_GAMMA, shift_right, splitmix64


def slot_uniform(seeds: Tensor, step: Tensor, slots: Tensor, *, stream: int) -> Tensor:
    """Return one float64 number in (0, 1) per slot, the same in any batch and on any device.

    The generator is counter-based (SplitMix64): it hashes seed, stream, step and slot.

    Args:
        seeds: Seed of each row, (B,).
        step: Step of each row, (B,).
        slots: Slots that need a number, (B, K).
        stream: Keeps different uses of the same key independent.
    """
    # Products and sums wrap around in 64 bits, as SplitMix64 intends.
    streams = torch.full_like(step, stream, dtype=torch.long) * GOLDEN_GAMMA
    row_key = splitmix64(seeds.long() + streams + GOLDEN_GAMMA)
    key = splitmix64(row_key + step.long() * GOLDEN_GAMMA + GOLDEN_GAMMA)
    bits = splitmix64(key[:, None] + slots.long() * GOLDEN_GAMMA + GOLDEN_GAMMA)
    return (shift_right(bits, 11).double() + 0.5) * 2.0**-53


def sample_categorical(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
    """Return tokens (B, R) drawn from softmax(logits / temperature) by inverse transform sampling.

    Args:
        logits: (B, R, V).
        temperature: Above 0.
        draws: Uniform numbers in (0, 1), (B, R).
    """
    # In float64: truncated float32 uniforms silently lower the temperature (arXiv 2409.02908).
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).double().cumsum(dim=-1)
    target = (draws * cumulative[..., -1]).unsqueeze(-1)
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp(max=cumulative.shape[-1] - 1)
