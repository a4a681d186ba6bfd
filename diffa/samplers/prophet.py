"""Early commit: once the leaders are clear enough, the whole block is written at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.samplers.acceptance import Rule, positive
from diffa.samplers.blocks import Place
from diffa.samplers.loop import Loop
from diffa.samplers.predictions import Predictions
from diffa.samplers.recompute import Cache
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Prophet:
    """Decode a block by a fixed schedule until the mean gap between the two best logits of its
    masks passes a bound, then commit to it (Prophet, arXiv 2508.19982).

    Args:
        vocab: the backbone's vocabulary.
        block: answer tokens per block; the whole answer's span for multiple choice.
        steps: forwards over the whole answer if nothing is committed; one per token where None.
        early: the bound on the gap in the first third of a block's masks.
        middle: in the second third.
        late: in the last.
        cache: as in ``blockwise``.
        stop: end a row when all tokens before its first EOS are decided.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block: int = 32,
        steps: int | None = None,
        early: float = 7.5,
        middle: float = 5.0,
        late: float = 2.5,
        cache: Cache = "none",
        stop: bool = True,
    ) -> None:
        self.rule = Rule(block=block, steps=steps)
        for name, value in {"early": early, "middle": middle, "late": late}.items():
            positive(name, value)
        self.vocab, self.bounds = vocab, (early, middle, late)
        self.loop = Loop(block, cache=cache, stop=stop)

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""

        def take(predictions: Predictions, place: Place) -> Tensor:
            scheduled = self.rule.take(predictions, place, canvas.length, None)
            return scheduled | (place.masked & self.clear(predictions.logits, place)[:, None])

        return self.loop(canvas, denoise, take)

    def clear(self, logits: Tensor, place: Place) -> Tensor:
        """Rows (B,) whose mean gap between the two best logits (B, R, V) passes its bound."""
        top = logits.topk(2, dim=-1).values
        count = place.masked.sum(dim=1)
        gaps = torch.where(place.masked, top[..., 0] - top[..., 1], 0.0)
        mean = gaps.sum(dim=1) / count.clamp(min=1)
        third = 3 * (place.due - count) // place.due.clamp(min=1)
        bounds = torch.tensor(self.bounds, device=logits.device)
        return mean > bounds[third.clamp(0, 2)]
