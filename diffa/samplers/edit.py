"""Unmask blocks and correct what is written in them: token editing of LLaDA2.1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import SpecError, check_at_least, check_non_negative
from diffa.samplers import selection
from diffa.samplers.block_memory import BlockMemory, block_width
from diffa.samplers.blocks import BlockState, BlockTracker, block_slots, fill_after_block
from diffa.samplers.predictions import Predictions, exclude_mask, predict
from diffa.samplers.recompute import RecomputePolicy, RecomputeSlots
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Edit:
    """Unmask blocks from left to right; a pass may also replace tokens of its block (LLaDA2.1).

    A block is left when a pass over its tokens changes none of them, or after ``max_post_steps``
    such passes. Prompt, draft and earlier blocks stay as they are.

    Args:
        vocab: The backbone's vocabulary.
        block_length: Answer tokens per block, at most the backbone's.
        threshold: Accept masked tokens whose probability is above this value.
        edit_threshold: Replace a token by another whose probability is above this value. Above 1
            nothing is replaced.
        max_post_steps: Passes over a block after its last mask is gone.
        num_to_transfer: Accept at least so many masked tokens per pass.
        cache: Keys and values of a block-causal backbone's earlier blocks: none, or kept (prefix),
            which gives the same tokens. Other backbones recompute everything.
        stop_at_eos: End a row after the block that holds an EOS; what follows becomes EOS.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block_length: int = 32,
        threshold: float = 0.95,
        edit_threshold: float = 0.9,
        max_post_steps: int = 16,
        num_to_transfer: int = 1,
        cache: Literal["none", "prefix"] = "prefix",
        stop_at_eos: bool = True,
    ) -> None:
        check_at_least(1, block_length=block_length, num_to_transfer=num_to_transfer)
        check_at_least(0, max_post_steps=max_post_steps)
        check_non_negative(threshold=threshold, edit_threshold=edit_threshold)
        self.vocab, self.block_length, self.threshold = vocab, block_length, threshold
        self.edit_threshold, self.max_post_steps = edit_threshold, max_post_steps
        self.num_to_transfer, self.stop_at_eos = num_to_transfer, stop_at_eos
        self.cache: Literal["none", "prefix"] = cache

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the masks and edit the blocks, yielding after every forward pass."""
        width = block_width(canvas, self.block_length)
        blocks = BlockTracker(canvas, width)
        recompute_slots = RecomputeSlots(self._policies(canvas, width))
        open_slots = torch.zeros_like(canvas.tokens[: canvas.count], dtype=torch.bool)
        open_slots[:, canvas.start : canvas.start + canvas.length] = canvas.undecided()
        post_steps = torch.zeros_like(canvas.seeds)
        stay = torch.zeros_like(canvas.seeds, dtype=torch.bool)
        while (state := blocks.current(stay)) is not None:
            slots, exists = block_slots(canvas, state, width)
            exists = exists & open_slots.gather(1, slots)
            recompute, write = recompute_slots(canvas, state)
            logits = denoise(recompute, torch.where(exists, slots, -1), write=write)
            predictions = predict(
                exclude_mask(logits, self.vocab.mask), seeds=canvas.seeds, step=state.step,
                places=slots - canvas.start,
            )  # fmt: skip
            tokens = canvas.tokens[: canvas.count].gather(1, slots)
            masked = exists & (tokens == self.vocab.mask)
            filled, edited = self._decide(predictions, tokens, masked, exists & ~masked)
            written = torch.where(filled | edited, slots, -1)
            canvas.write(written, predictions.tokens, predictions.confidence)
            # A row whose block has no masks left stays for post steps that may edit it.
            left = (masked & ~filled).any(dim=1)
            post_steps = torch.where(state.entered, 0, post_steps) + (~left).long()
            settled = ~masked.any(dim=1) & ~edited.any(dim=1)
            stay = state.active & ~left & ~settled & (post_steps <= self.max_post_steps)
            if self.stop_at_eos:
                fill_after_block(canvas, state, where=~stay)
            blocks.advance()
            yield _make_step(canvas, state, stay)

    def _policies(self, canvas: Canvas, width: int) -> list[RecomputePolicy]:
        attention = canvas.attention
        if attention is not None and attention.shifted:
            raise SpecError(
                "the sampler 'edit' needs states that predict their own token, as those of llada2 "
                "and sdar do; use blockwise"
            )
        if attention is None or self.cache == "none":
            return []
        return [BlockMemory(canvas, width, cache=self.cache, merge_commit=True)]

    def _decide(
        self, predictions: Predictions, tokens: Tensor, masked: Tensor, decided: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return which masked slots (B, W) to fill, and which decided ones to replace."""
        confidence = predictions.confidence
        least = torch.full_like(tokens[:, 0], self.num_to_transfer)
        filled = selection.select_planned(confidence, masked, least, self.threshold)
        changed = decided & (tokens != predictions.tokens)
        return filled & masked, changed & (confidence > self.edit_threshold)


def _make_step(canvas: Canvas, state: BlockState, stay: Tensor) -> Step:
    """Return the step of this pass; tokens of a block that a row may still edit are not final."""
    here = slice(canvas.requested)
    place = torch.arange(canvas.requested, device=stay.device)
    before = place < (state.start - canvas.start)[:, None]
    done = ~(canvas.undecided()[:, here].any(dim=1) | stay)
    final = before | done[:, None]
    return Step(canvas.answer[:, here].clone(), final, canvas.confidence[:, here].clone())
