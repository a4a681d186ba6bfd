"""Which answer tokens are masked at a level, and the weight of their losses.

Shapes: ``level`` (B, 1) or (B, L), ``draws`` (B, L) one uniform number per token, ``answer`` (B, L)
bool. All blocks of a row are masked at once; a whole answer is one block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AnswerBlocks(NamedTuple):
    """The block of each answer token, (B, L) each.

    Attributes:
        number: Number of the block.
        size: Answer tokens in the block.
        first: Index of the block's first token within the answer.
    """

    number: Tensor
    size: Tensor
    first: Tensor


def answer_blocks(answer: Tensor, block_length: int | None) -> AnswerBlocks:
    """Divide each row's answer tokens into blocks; None makes one block of all."""
    total = answer.sum(dim=1, keepdim=True)
    place = (answer.cumsum(dim=1) - 1).clamp(min=0)
    if block_length is None:
        return AnswerBlocks(
            torch.zeros_like(place), total.expand_as(place), torch.zeros_like(place)
        )
    first = place // block_length * block_length
    size = (total - first).clamp(max=block_length)
    return AnswerBlocks(place // block_length, size, first)


def mask_bernoulli(level: Tensor, draws: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Mask each answer token with probability ``level``; its weight is 1 / level."""
    return answer & (draws < level), 1 / level


def mask_count(
    level: Tensor, draws: Tensor, answer: Tensor, blocks: AnswerBlocks
) -> tuple[Tensor, Tensor]:
    """Mask exactly l = ceil(level A) of a block's A tokens; their weight is A / l.

    The bound is the same as with independent masks, with less variance: as slope(t) dt = d level,
    every l in 1..A has the same probability times slope.
    """
    count = torch.ceil(level * blocks.size).clamp(min=1)
    return answer & (rank_in_block(draws, answer, blocks) < count), blocks.size / count


def mask_complementary(
    level: Tensor, draws: Tensor, answer: Tensor, blocks: AnswerBlocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask l of a block's A tokens, l uniform on 0..A, and in a second copy the other A - l.

    Each copy alone has the bound as its expectation, and together they mask every token once. The
    weight 1 / level would be unbounded in the second copy, where it is 1 / (1 - t).

    Returns:
        The masks of the first copy, and the weights (A + 1) / l and (A + 1) / (A - l).
    """
    count = torch.floor(level * (blocks.size + 1)).clamp(max=blocks.size)
    masked = rank_in_block(draws, answer, blocks) < count  # other tokens rank after the answer's
    whole = blocks.size + 1
    return masked, whole / count.clamp(min=1), whole / (blocks.size - count).clamp(min=1)


def rank_in_block(draws: Tensor, answer: Tensor, blocks: AnswerBlocks) -> Tensor:
    """Return the rank of each answer token among the draws of its block, from 0, (B, L)."""
    # Keys of block k lie in (k, k + 1): one sort of the row sorts every block in its place.
    keys = (draws.double() + blocks.number).masked_fill(~answer, torch.inf)
    return keys.argsort(stable=True, dim=1).argsort(dim=1) - blocks.first
