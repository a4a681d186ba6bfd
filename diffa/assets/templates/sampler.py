"""A sampler that writes the one token it is surest of after every forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from diffa.errors import SpecError
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Part:
    """Recompute everything, then write the ``tokens`` likeliest tokens of every row."""

    decoding: Literal["masked"] = "masked"

    def __init__(self, vocab: Vocab, *, tokens: int = 1) -> None:
        if tokens < 1:
            raise SpecError(f"tokens must be at least 1, got {tokens}")
        self.vocab, self.tokens = vocab, tokens

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        slots = torch.arange(canvas.start, canvas.start + canvas.length, device=canvas.seeds.device)
        while bool(canvas.undecided().any()):
            rows = torch.where(canvas.undecided(), slots, -1)  # -1 asks for nothing
            logits = denoise(None, rows).float()
            logits[..., self.vocab.mask] = -torch.inf  # an answer holds no mask
            confidence, tokens = logits.softmax(dim=-1).max(dim=-1)
            confidence = confidence.masked_fill(rows < 0, -1.0)
            best = confidence.topk(min(self.tokens, canvas.length), dim=1).indices
            canvas.write(rows.gather(1, best), tokens.gather(1, best), confidence.gather(1, best))
            yield Step(canvas.answer.clone(), ~canvas.undecided(), canvas.confidence.clone())
