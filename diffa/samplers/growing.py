"""Choose the answer's length while decoding: grow the canvas, or cut it (DAEDAL)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import check_at_least, check_shares
from diffa.samplers.blocks import BlockState, make_step
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.lengths import insert_masks, resize_answers
from diffa.samplers.predictions import Predictions, exclude_mask
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Growing:
    """Choose the answer's length, then decode as ``blockwise`` does.

    The canvas starts short and grows while its tail does not expect EOS (DAEDAL, arXiv 2508.00819),
    or it is cut after the first expected EOS. Unused slots cost nothing and become EOS.

    Args:
        vocab: The backbone's vocabulary.
        block_length: Answer tokens per block (LLaDA).
        steps: Denoising steps for the whole answer, as in ``blockwise``. Default: one token per
            step.
        threshold: Accept every token whose probability reaches this value (Fast-dLLM). Excludes
            ``steps``.
        initial_length: Answer tokens at the start (DAEDAL).
        expansion_length: Answer tokens to add at a time, for one pass each (DAEDAL's
            ``expansion_factor``).
        eos_check_tokens: Trailing masks whose EOS probability decides about growing (DAEDAL).
        eos_threshold: Stop growing when the mean EOS probability of those masks reaches this value.
        insert_length: Masks to insert after the least confident mask while decoding. Default: none.
            Rows with a draft or an EOS insert none.
        insert_threshold: Insert masks only where the confidence is below this value.
        cut_threshold: Instead of growing, read the whole canvas once and cut it after the first
            slot whose EOS probability reaches this value. Default: grow.
        stop_at_eos: End a row once all tokens before its first EOS are decided; the rest becomes
            EOS.

    Raises:
        SpecError: steps and threshold together, or a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block_length: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        initial_length: int = 32,
        expansion_length: int = 8,
        eos_check_tokens: int = 32,
        eos_threshold: float = 0.5,
        insert_length: int = 0,
        insert_threshold: float = 0.1,
        cut_threshold: float = 0.0,
        stop_at_eos: bool = True,
    ) -> None:
        check_at_least(
            1, initial_length=initial_length, expansion_length=expansion_length,
            eos_check_tokens=eos_check_tokens,
        )  # fmt: skip
        check_at_least(0, insert_length=insert_length)
        check_shares(
            eos_threshold=eos_threshold, insert_threshold=insert_threshold,
            cut_threshold=cut_threshold,
        )  # fmt: skip
        self.blockwise = Blockwise(
            vocab, block_length=block_length, steps=steps, threshold=threshold,
            stop_at_eos=stop_at_eos,
        )  # fmt: skip
        self.block_length, self.initial_length = block_length, initial_length
        self.expansion_length, self.eos_check_tokens = expansion_length, eos_check_tokens
        self.eos_threshold, self.cut_threshold = eos_threshold, cut_threshold
        self.insert_length, self.insert_threshold = insert_length, insert_threshold

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Choose the lengths, then fill all masks, yielding after every forward pass."""
        writable = canvas.undecided()
        places = torch.arange(canvas.length, device=writable.device)
        # A draft is never cut off: rows are at least as long as their last given token.
        shortest = torch.where(writable, 0, places + 1).amax(dim=1)
        first = canvas.length if self.cut_threshold else self.initial_length
        length = torch.full_like(shortest, first).maximum(shortest).clamp(max=canvas.length)
        pending = writable.any(dim=1) & ((length < canvas.length) | bool(self.cut_threshold))
        resize_answers(canvas, writable, length)
        while bool(pending.any()):
            p_eos, slots = self._eos_probability(canvas, denoise, writable, length, pending)
            if self.cut_threshold:
                ends = (p_eos >= self.cut_threshold) & (slots >= 0)
                cut = torch.where(ends, slots - canvas.start + 1, canvas.length).amin(dim=1)
                length, pending = cut.maximum(shortest), pending & False
            else:
                mean = p_eos.sum(dim=1) / (slots >= 0).sum(dim=1).clamp(min=1)
                pending = pending & (mean < self.eos_threshold)
                longer = length + self.expansion_length
                length = torch.where(pending, longer, length).clamp(max=canvas.length)
                pending = pending & (length < canvas.length)
            resize_answers(canvas, writable, length)
            yield make_step(canvas, revisable_block_length=self.block_length)
        yield from self._fill(canvas, denoise, writable, length)

    def _eos_probability(
        self, canvas: Canvas, denoise: Denoise, writable: Tensor, length: Tensor, pending: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the EOS probability (B, A) at the slots (B, A) that decide about the length."""
        places = torch.arange(canvas.length, device=length.device)
        tail = canvas.length if self.cut_threshold else self.eos_check_tokens
        near = (places < length[:, None]) & (places >= length[:, None] - tail)
        slots = torch.where(near & writable & pending[:, None], places + canvas.start, -1)
        logits = exclude_mask(denoise(None, slots, write=False), canvas.vocab.mask)
        p_eos = logits.softmax(dim=-1)[..., canvas.vocab.eos]
        return torch.where(slots >= 0, p_eos, 0.0), slots

    def _fill(
        self, canvas: Canvas, denoise: Denoise, writable: Tensor, length: Tensor
    ) -> Iterator[Step]:
        """Decode the canvas, inserting masks where the least confident mask is in doubt."""
        doubtful_place = torch.full_like(length, canvas.length)

        def accept(predictions: Predictions, state: BlockState) -> Tensor:
            accepted = self.blockwise.rule.accept(predictions, state)
            left = predictions.confidence.masked_fill(~state.masked | accepted, torch.inf)
            lowest, index = left.min(dim=1)
            place = state.places.gather(1, index[:, None])[:, 0]
            doubtful = lowest < self.insert_threshold
            doubtful_place.copy_(torch.where(doubtful, place, canvas.length))
            return accepted

        for _ in self.blockwise.unmask(canvas, denoise, accept):
            if self.insert_length:
                length = insert_masks(canvas, writable, length, doubtful_place, self.insert_length)
            yield make_step(canvas, revisable_block_length=self.block_length)
