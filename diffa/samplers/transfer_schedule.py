"""LLaDA's fixed schedule: how many tokens each forward pass accepts when ``steps`` is given."""

from __future__ import annotations

import torch
from torch import Tensor

from diffa.samplers.blocks import BlockState


def num_transfer_tokens(state: BlockState, steps: int | None, block_length: int) -> Tensor:
    """Return how many tokens (B,) each row accepts in this pass.

    A block of m masks and n steps accepts m // n tokens per step, and one more in its first
    m % n steps (``get_num_transfer_tokens`` of LLaDA's code).
    """
    if steps is None:
        return torch.ones_like(state.block)
    # ``steps_per_block`` at these blocks, counted on the device: a GPU waits for a table.
    length, index = state.answer_length, state.block.clamp(min=0)
    total = min(steps, length)
    first, last = (((index + i) * block_length).clamp(max=length) * total // length for i in (0, 1))
    count = (last - first).clamp(min=1)
    masks = state.initial_masks
    return masks // count + (state.block_step < masks % count).long()


def planned_tokens(state: BlockState, steps: int) -> Tensor:
    """Return how many tokens (B,) a pass accepts where every block takes ``steps`` passes.

    A block of B slots accepts B // steps per pass, and one more in its first B % steps passes,
    however many of its slots are prompt (SDAR, LLaDA2.0).
    """
    width = state.width
    return width // steps + (state.block_step < width % steps).long()


def steps_per_block(steps: int | None, answer_length: int, block_length: int) -> list[int]:
    """Divide ``steps`` (default: one per token) among blocks by their length, at least one each."""
    total = min(steps or answer_length, answer_length)
    starts = range(0, answer_length, block_length)
    ends = [min(start + block_length, answer_length) * total // answer_length for start in starts]
    return [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
