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
    """Decode a canvas that begins short and grows while its tail expects no EOS (DAEDAL,
    arXiv 2508.00819), or one that is cut behind the first EOS expected. Slots that are not used
    cost nothing and become EOS.

    Args:
        vocab: the backbone's vocabulary.
        block: answer tokens per block.
        steps: forwards as in ``blockwise``, or
        threshold: accept probabilities of at least this.
        initial: answer tokens at the start.
        grow: tokens to add at once, a forward each time.
        tail: how many of the last masks are asked for an EOS.
        enough: mean probability of EOS over the tail at which growing ends.
        insert: masks to put behind a mask of less than ``low`` probability while decoding; 0 for
            none. Rows with a draft, or with an EOS, insert none.
        low: see ``insert``.
        cut: instead of growing, read the whole canvas once and cut it behind the first slot
            that is EOS with at least this probability; 0 grows.
        stop: end a row when all tokens before its first EOS are decided.

    Raises:
        SpecError: steps and threshold together, or a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        initial: int = 32,
        grow: int = 8,
        tail: int = 32,
        enough: float = 0.5,
        insert: int = 0,
        low: float = 0.1,
        cut: float = 0.0,
        stop: bool = True,
    ) -> None:
        self.rule = Rule(block=block, steps=steps, threshold=threshold)
        for name, value in {"initial": initial, "grow": grow, "tail": tail}.items():
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        for name, share in {"enough": enough, "low": low, "cut": cut}.items():
            if not 0 <= share <= 1:
                raise SpecError(f"{name} must lie between 0 and 1, got {share}")
        if insert < 0:
            raise SpecError(f"insert must be at least 0, got {insert}")
        self.vocab, self.block, self.loop = vocab, block, Loop(block, stop=stop)
        self.initial, self.grow, self.tail, self.enough = initial, grow, tail, enough
        self.insert, self.low, self.cut = insert, low, cut

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Find the lengths, then fill the canvas's answers, yielding after every forward."""
        ours = canvas.undecided()
        places = torch.arange(canvas.length, device=ours.device)
        given = torch.where(ours, 0, places + 1).amax(dim=1)  # a draft is never cut off
        size = torch.full_like(given, canvas.length if self.cut else self.initial)
        size = size.maximum(given).clamp(max=canvas.length)
        busy = ours.any(dim=1) & ((size < canvas.length) | bool(self.cut))
        resize(canvas, ours, size)
        while bool(busy.any()):
            share, rows = self._ends(canvas, denoise, ours, size, busy)
            if self.cut:
                hit = (share >= self.cut) & (rows >= 0)
                first = torch.where(hit, rows - canvas.start + 1, canvas.length).amin(dim=1)
                size, busy = first.maximum(given), busy & False
            else:
                mean = share.sum(dim=1) / (rows >= 0).sum(dim=1).clamp(min=1)
                busy = busy & (mean < self.enough)
                size = torch.where(busy, size + self.grow, size).clamp(max=canvas.length)
                busy = busy & (size < canvas.length)
            resize(canvas, ours, size)
            yield snapshot(canvas, revised=self.block)
        yield from self._fill(canvas, denoise, ours, size)

    def _ends(
        self, canvas: Canvas, denoise: Denoise, ours: Tensor, size: Tensor, busy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Probability of EOS (B, R) at the slots (B, R) that are asked for it."""
        places = torch.arange(canvas.length, device=size.device)
        tail = canvas.length if self.cut else self.tail
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
            spot.copy_(torch.where(least < self.low, found, canvas.length))
            return taken

        for _ in self.loop(canvas, denoise, take):
            if self.insert:
                size = insert(canvas, ours, size, spot, self.insert)
            yield snapshot(canvas, revised=self.block)
