"""Early commit: write the whole block once the model is sure of its tokens (Prophet)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import check_non_negative
from diffa.samplers.blocks import BlockState
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.predictions import Predictions
from diffa.samplers.recompute import CacheMode
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
        cache: CacheMode = "none",
        stop_at_eos: bool = True,
    ) -> None:
        check_non_negative(early_gap=early_gap, middle_gap=middle_gap, late_gap=late_gap)
        self.blockwise = Blockwise(
            vocab, block_length=block_length, steps=steps, cache=cache, stop_at_eos=stop_at_eos
        )
        self.gaps = early_gap, middle_gap, late_gap

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the masks of the canvas's answers, yielding after every forward pass."""
        return self.blockwise.unmask(canvas, denoise, self._accept)

    def _accept(self, predictions: Predictions, state: BlockState) -> Tensor:
        """Accept the schedule's tokens, and whole blocks that are committed."""
        scheduled = self.blockwise.rule.accept(predictions, state)
        return scheduled | (state.masked & self._commit(predictions.logits, state)[:, None])

    def _commit(self, logits: Tensor, state: BlockState) -> Tensor:
        """Return the rows (B,) whose mean gap between the two highest logits exceeds its bound."""
        top = logits.topk(2, dim=-1).values
        count = state.masked.sum(dim=1)
        gaps = torch.where(state.masked, top[..., 0] - top[..., 1], 0.0)
        mean = gaps.sum(dim=1) / count.clamp(min=1)
        # 0, 1 or 2: the third of the block's masks that decoding has reached.
        third = 3 * (state.initial_masks - count) // state.initial_masks.clamp(min=1)
        bounds = torch.tensor(self.gaps, device=logits.device)
        return mean > bounds[third.clamp(0, 2)]
