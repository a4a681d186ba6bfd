"""Revise a draft: mask again what the model doubts, and fill it in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from diffa.errors import SpecError
from diffa.samplers.acceptance import Rule
from diffa.samplers.blocks import asked, snapshot
from diffa.samplers.loop import Loop
from diffa.samplers.predictions import clean
from diffa.samplers.recompute import Cache
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
        cache: Cache = "none",
        stop_at_eos: bool = True,
    ) -> None:
        self.rule = Rule(block_length=block_length, steps=steps, threshold=threshold)
        if not 0 <= remask_threshold <= 1:
            raise SpecError(f"remask_threshold must lie between 0 and 1, got {remask_threshold}")
        self.vocab, self.remask_threshold = vocab, remask_threshold
        self.loop = Loop(block_length, cache=cache, stop_at_eos=stop_at_eos)

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Revise and fill the canvas's answers, yielding after every forward."""
        slots = torch.arange(canvas.length, device=canvas.tokens.device) + canvas.start
        rows = asked(torch.where(canvas.undecided(), -1, slots))
        if rows.shape[1] and bool((rows >= 0).any()):
            self._doubt(canvas, denoise, rows)
            yield snapshot(canvas)
        yield from self.loop(
            canvas,
            denoise,
            lambda predictions, place: self.rule.take(predictions, place, canvas.length, None),
        )

    def _doubt(self, canvas: Canvas, denoise: Denoise, rows: torch.Tensor) -> None:
        """Mask the tokens at ``rows`` (B, R) again that the model finds unlikely."""
        logits = clean(denoise(None, rows, write=False), canvas.vocab.mask)
        tokens = canvas.tokens[: canvas.count].gather(1, rows.clamp(min=0)).clamp(min=0)
        known = logits.gather(-1, tokens[..., None])[..., 0]
        share = (known - logits.logsumexp(dim=-1)).exp()
        canvas.write(rows, tokens, share)
        doubted = torch.where((share < self.remask_threshold) & (rows >= 0), rows, -1)
        masks = torch.full_like(tokens, canvas.vocab.mask or 0)
        canvas.write(doubted, masks, torch.zeros_like(share))
