"""Find the answer's length: grow the canvas until its end is seen, or cut it there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers.acceptance import Rule
from diffa.samplers.blocks import Place, snapshot
from diffa.samplers.lengths import insert, resize
from diffa.samplers.loop import Loop
from diffa.samplers.predictions import Predictions, clean
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
        self.rule = Rule(block_length=block_length, steps=steps, threshold=threshold)
        for name, value in {
            "initial_length": initial_length,
            "expansion_length": expansion_length,
            "eos_check_tokens": eos_check_tokens,
        }.items():
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        for name, share in {
            "eos_threshold": eos_threshold,
            "insert_threshold": insert_threshold,
            "cut_threshold": cut_threshold,
        }.items():
            if not 0 <= share <= 1:
                raise SpecError(f"{name} must lie between 0 and 1, got {share}")
        if insert_length < 0:
            raise SpecError(f"insert_length must be at least 0, got {insert_length}")
        self.vocab, self.block_length, self.loop = (
            vocab,
            block_length,
            Loop(block_length, stop_at_eos=stop_at_eos),
        )
        self.initial_length, self.expansion_length, self.eos_check_tokens, self.eos_threshold = (
            initial_length,
            expansion_length,
            eos_check_tokens,
            eos_threshold,
        )
        self.insert_length, self.insert_threshold, self.cut_threshold = (
            insert_length,
            insert_threshold,
            cut_threshold,
        )

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Find the lengths, then fill the canvas's answers, yielding after every forward."""
        ours = canvas.undecided()
        places = torch.arange(canvas.length, device=ours.device)
        given = torch.where(ours, 0, places + 1).amax(dim=1)  # a draft is never cut off
        size = torch.full_like(given, canvas.length if self.cut_threshold else self.initial_length)
        size = size.maximum(given).clamp(max=canvas.length)
        busy = ours.any(dim=1) & ((size < canvas.length) | bool(self.cut_threshold))
        resize(canvas, ours, size)
        while bool(busy.any()):
            share, rows = self._ends(canvas, denoise, ours, size, busy)
            if self.cut_threshold:
                hit = (share >= self.cut_threshold) & (rows >= 0)
                first = torch.where(hit, rows - canvas.start + 1, canvas.length).amin(dim=1)
                size, busy = first.maximum(given), busy & False
            else:
                mean = share.sum(dim=1) / (rows >= 0).sum(dim=1).clamp(min=1)
                busy = busy & (mean < self.eos_threshold)
                size = torch.where(busy, size + self.expansion_length, size).clamp(
                    max=canvas.length
                )
                busy = busy & (size < canvas.length)
            resize(canvas, ours, size)
            yield snapshot(canvas, revised=self.block_length)
        yield from self._fill(canvas, denoise, ours, size)

    def _ends(
        self, canvas: Canvas, denoise: Denoise, ours: Tensor, size: Tensor, busy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Probability of EOS (B, R) at the slots (B, R) that are asked for it."""
        places = torch.arange(canvas.length, device=size.device)
        tail = canvas.length if self.cut_threshold else self.eos_check_tokens
        near = (places < size[:, None]) & (places >= size[:, None] - tail)
        rows = torch.where(near & ours & busy[:, None], places + canvas.start, -1)
        logits = clean(denoise(None, rows, write=False), canvas.vocab.mask)
        share = logits.softmax(dim=-1)[..., canvas.vocab.eos]
        return torch.where(rows >= 0, share, 0.0), rows

    def _fill(self, canvas: Canvas, denoise: Denoise, ours: Tensor, size: Tensor) -> Iterator[Step]:
        """Unmask the canvas, inserting masks where the model is at a loss."""
        spot = torch.full_like(size, canvas.length)

        def take(predictions: Predictions, place: Place) -> Tensor:
            taken = self.rule.take(predictions, place, canvas.length, None)
            left = predictions.confidence.masked_fill(~place.masked | taken, torch.inf)
            least, where = left.min(dim=1)
            found = place.places.gather(1, where[:, None])[:, 0]
            spot.copy_(torch.where(least < self.insert_threshold, found, canvas.length))
            return taken

        for _ in self.loop(canvas, denoise, take):
            if self.insert_length:
                size = insert(canvas, ours, size, spot, self.insert_length)
            yield snapshot(canvas, revised=self.block_length)
