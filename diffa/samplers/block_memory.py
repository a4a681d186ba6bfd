"""Exact memory of block-causal backbones: keys and values of finished blocks, computed once.

A pass over the block being decoded attends to itself and to the blocks before it. What an earlier
block holds never changes again, so its keys and values are stored ("committed") when it is
decided::

    prompt | p p a a | a a a a | m a m m |          p prompt, a answer, m mask
    stored   stored    to commit  decoded
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers.blocks import BlockState

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas
    from diffa.samplers.recompute import CacheMode


class BlockMemory:
    """Recompute policy of a canvas with block-causal attention.

    Args:
        canvas: Its ``attention`` is set.
        width: Tokens per block of the sampler: the backbone's block, or a part of it.
        cache: ``none`` recomputes everything, ``prefix`` the backbone's block alone, ``dual`` the
            sampler's part alone once a pass has computed the whole block (Fast-dLLM v2).
        merge_commit: Commit a block in the first pass of the next one, not in a pass of its own.
            A shifted backbone decides the next block's first token in a pass of its own anyway.
    """

    def __init__(self, canvas: Canvas, width: int, *, cache: CacheMode, merge_commit: bool) -> None:
        attention = canvas.attention
        assert attention is not None
        self.cache, self._canvas = cache, canvas
        self._shifted, self._merge = attention.shifted, merge_commit or cache == "none"
        # Number of the backbone's block and of the sampler's part that each slot is in.
        self._block = canvas.block_numbers(attention.length)[: canvas.count]
        self._part = canvas.block_numbers(width)[: canvas.count]
        before = canvas.block_numbers(attention.length, ahead=-1)[: canvas.count]
        self._is_first: Tensor = torch.ne(self._block, before)
        self._stored = self._block[:, 0]  # blocks before this one are stored
        if canvas.stored_blocks is not None:
            self._stored = canvas.stored_blocks
        self._whole_part = torch.full_like(
            canvas.seeds, -2
        )  # part whose whole block was computed last
        self._commits = torch.zeros_like(canvas.seeds, dtype=torch.bool)

    def narrow(self, state: BlockState) -> tuple[BlockState, Tensor]:
        """Return the state of this pass, and which rows (B,) commit a block in it.

        Such a row decides the first token of its next block with a shifted backbone, and nothing
        with any other.
        """
        slots = state.masked_slots
        leftmost = slots.masked_fill(slots < 0, self._canvas.size).amin(dim=1, keepdim=True)
        first = self._is_first.gather(1, leftmost.clamp(max=self._canvas.size - 1))[:, 0]
        opens = first & state.active & self._shifted
        own = self._block.gather(1, state.start[:, None])[:, 0]
        alone = (self._stored < own) & (not self._merge)
        self._commits = state.active & (opens | alone)
        keep = ~self._commits[:, None] | (opens[:, None] & (slots == leftmost))
        slots = torch.where(keep, slots, -1)
        return state._replace(masked_slots=slots, places=slots - self._canvas.start), self._commits

    def __call__(self, recompute: Tensor, canvas: Canvas, state: BlockState) -> Tensor:
        """Return the slots (B, S) to recompute: what is not stored yet, up to the row's block."""
        own = self._block.gather(1, state.start[:, None])
        unstored = (self._block >= self._stored[:, None]) & (self._block <= own)
        unstored &= ~self._commits[:, None] | (self._block < own)
        if self.cache == "dual":
            unstored &= self._part_alone(state)
        self._stored = torch.where(state.active, own[:, 0], self._stored)
        return recompute & unstored

    def _part_alone(self, state: BlockState) -> Tensor:
        """Return the slots (B, S) of a row's part, or all where its block is computed as a whole.

        That is so when a row enters a part, and until the part's first token is decided.
        """
        number = self._part.gather(1, state.start[:, None])
        # Padding has positions too, which may be those of the part.
        part = torch.eq(self._part, number) & self._canvas.valid[: len(number)]
        first = part.int().argmax(dim=1, keepdim=True)
        masked = (state.masked_slots == first).any(dim=1)
        whole = (self._whole_part != number[:, 0]) | masked | self._commits
        entered = state.active & ~self._commits
        self._whole_part = torch.where(entered, number[:, 0], self._whole_part)
        return part | whole[:, None]


def block_width(canvas: Canvas, block_length: int) -> int:
    """Return the tokens per block of a sampler: at most the backbone's block, which it divides.

    Raises:
        SpecError: The sampler's ``block_length`` does not divide the backbone's.
    """
    if canvas.attention is None:
        return block_length
    length = canvas.attention.length
    width = min(block_length, length)
    if length % width:
        raise SpecError(
            f"block_length is {block_length}, but the backbone's blocks have {length} tokens: "
            "choose a divisor of that"
        )
    return width
