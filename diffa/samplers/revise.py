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
    """Read a draft once, mask its doubtful tokens again, and decode as usual (deliberation:
    Whisper-LLaDA's correction of transcripts). Without a draft it is plain decoding.

    Args:
        vocab: the backbone's vocabulary.
        doubt: a draft's token below this probability, all others given, is masked again.
        block: answer tokens per block.
        steps: forwards over the whole answer, or
        threshold: accept probabilities of at least this.
        cache: as in ``blockwise``.
        stop: end a row when all tokens before its first EOS are decided.

    Raises:
        SpecError: steps and threshold together, or a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        doubt: float = 0.5,
        block: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        cache: Cache = "none",
        stop: bool = True,
    ) -> None:
        self.rule = Rule(block=block, steps=steps, threshold=threshold)
        if not 0 <= doubt <= 1:
            raise SpecError(f"doubt must lie between 0 and 1, got {doubt}")
        self.vocab, self.doubt = vocab, doubt
        self.loop = Loop(block, cache=cache, stop=stop)

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
        doubted = torch.where((share < self.doubt) & (rows >= 0), rows, -1)
        masks = torch.full_like(tokens, canvas.vocab.mask or 0)
        canvas.write(doubted, masks, torch.zeros_like(share))
