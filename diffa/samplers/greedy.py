"""Left-to-right decoding for causal backbones: the likeliest token, or one from the nucleus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers.rng import categorical, uniform
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Greedy:
    """Decode one token after the other from left to right, for causal backbones.

    Args:
        vocab: The backbone's vocabulary.
        temperature: Sampling temperature. Default: take the most likely token.
        top_p: With a temperature, sample among the most likely tokens whose probabilities sum up to
            this value (nucleus sampling, arXiv 1904.09751). Default: all.
        stop_at_eos: End a row at its first EOS; the rest becomes EOS.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Literal["causal"] = "causal"

    def __init__(
        self,
        vocab: Vocab,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_at_eos: bool = True,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise SpecError(f"temperature must be 0 or more, got {temperature}")
        if not 0 < top_p <= 1:
            raise SpecError(f"top_p must lie above 0 and up to 1, got {top_p}")
        self.vocab, self.temperature, self.top_p, self.stop_at_eos = (
            vocab,
            temperature,
            top_p,
            stop_at_eos,
        )

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        ahead = torch.arange(canvas.start, device=canvas.tokens.device)
        there = canvas.valid[:, : canvas.start]
        recompute = torch.where(there, ahead, -1)
        rows = torch.where(there, ahead, -1).amax(dim=1, keepdim=True)
        alive = torch.ones_like(canvas.seeds, dtype=torch.bool)
        final = torch.zeros_like(canvas.answer, dtype=torch.bool)
        for place in range(canvas.length):
            slot = torch.where(alive, canvas.start + place, -1)[:, None]
            tokens, confidence = self._read(denoise(recompute, rows), canvas.seeds, place, slot)
            canvas.write(slot, tokens, confidence)
            final[:, place] = True
            if self.stop_at_eos:
                ended = alive & (tokens[:, 0] == self.vocab.eos)
                behind = torch.arange(canvas.length, device=slot.device) > place
                canvas.fill(ended[:, None] & behind, self.vocab.eos)
                final |= ended[:, None]
                alive = alive & ~ended
            yield Step(canvas.answer.clone(), final.clone(), canvas.confidence.clone())
            if not bool(alive.any()):
                return
            recompute = rows = torch.where(alive[:, None], slot, -1)

    def _read(
        self, logits: Tensor, seeds: Tensor, place: int, slot: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose a token (B, 1) from logits (B, 1, V); return it with its probability."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shares = logits.softmax(dim=-1)
        if not self.temperature:
            confidence, tokens = shares.max(dim=-1)
            return tokens, confidence
        step = torch.full_like(seeds, place)
        draws = uniform(seeds, step, slot - slot, stream=1)
        tokens = categorical(self._nucleus(logits), self.temperature, draws)
        return tokens, shares.gather(-1, tokens[..., None])[..., 0]

    def _nucleus(self, logits: Tensor) -> Tensor:
        if self.top_p == 1:
            return logits
        ordered, order = (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        outside = (ordered.cumsum(dim=-1) - ordered) >= self.top_p
        return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
