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
    """Decode by a fixed schedule, and commit a whole block once the model is sure of it.

    A block is committed when the mean gap between the two highest logits of its masks exceeds a
    bound (Prophet, arXiv 2508.19982).

    Args:
        vocab: The backbone's vocabulary.
        block_length: Answer tokens per block; use the whole answer for multiple choice.
        steps: Denoising steps for the whole answer if nothing is committed. Default: one token per
            step.
        early_gap: Logit gap that commits a block in the first third of its masks.
        middle_gap: Logit gap that commits a block in the second third of its masks.
        late_gap: Logit gap that commits a block in the last third of its masks.
        cache: Keys and values kept within a block: none, those before it (prefix), or also those
            after it (dual).
        stop_at_eos: End a row once all tokens before its first EOS are decided; the rest becomes
            EOS.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block_length: int = 32,
        steps: int | None = None,
        early_gap: float = 7.5,
        middle_gap: float = 5.0,
        late_gap: float = 2.5,
        cache: Cache = "none",
        stop_at_eos: bool = True,
    ) -> None:
        self.rule = Rule(block_length=block_length, steps=steps)
        for name, value in {
            "early_gap": early_gap,
            "middle_gap": middle_gap,
            "late_gap": late_gap,
        }.items():
            positive(name, value)
        self.vocab, self.bounds = vocab, (early_gap, middle_gap, late_gap)
        self.loop = Loop(block_length, cache=cache, stop_at_eos=stop_at_eos)

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
