"""Revise a draft: mask the tokens that the model doubts again, and decode them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from diffa.errors import check_shares
from diffa.samplers.blocks import drop_padding, make_step
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.predictions import exclude_mask, token_probability
from diffa.samplers.recompute import CacheMode
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Revise:
    """Mask the doubtful tokens of a draft again, then decode as ``blockwise`` does.

    One pass scores the draft (Whisper-LLaDA's deliberation over transcripts). Without a draft this
    is blockwise decoding.

    Args:
        vocab: The backbone's vocabulary.
        remask_threshold: Mask a draft's token again if its probability is below this value.
        block_length: Answer tokens per block (LLaDA).
        steps: Denoising steps for the whole answer, as in ``blockwise``. Default: one token per
            step.
        threshold: Accept every token whose probability reaches this value (Fast-dLLM). Excludes
            ``steps``.
        cache: Keys and values kept within a block: none, those before it (prefix), or also those
            after it (dual).
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
        remask_threshold: float = 0.5,
        block_length: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        cache: CacheMode = "none",
        stop_at_eos: bool = True,
    ) -> None:
        check_shares(remask_threshold=remask_threshold)
        self.blockwise = Blockwise(
            vocab, block_length=block_length, steps=steps, threshold=threshold, cache=cache,
            stop_at_eos=stop_at_eos,
        )  # fmt: skip
        self.remask_threshold = remask_threshold

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Mask doubtful tokens again, then fill all masks, yielding after every forward pass."""
        slots = torch.arange(canvas.length, device=canvas.tokens.device) + canvas.start
        draft_slots = drop_padding(torch.where(canvas.undecided(), -1, slots))
        if draft_slots.shape[1] and bool((draft_slots >= 0).any()):
            self._remask(canvas, denoise, draft_slots)
            yield make_step(canvas)
        yield from self.blockwise(canvas, denoise)

    def _remask(self, canvas: Canvas, denoise: Denoise, slots: torch.Tensor) -> None:
        """Mask tokens at ``slots`` (B, R) again whose probability is below the threshold."""
        logits = exclude_mask(denoise(None, slots, write=False), canvas.vocab.mask)
        tokens = canvas.tokens[: canvas.count].gather(1, slots.clamp(min=0)).clamp(min=0)
        probability = token_probability(logits, tokens)
        canvas.write(slots, tokens, probability)
        doubtful = torch.where((probability < self.remask_threshold) & (slots >= 0), slots, -1)
        masks = torch.full_like(tokens, canvas.vocab.mask or 0)
        canvas.write(doubtful, masks, torch.zeros_like(probability))
