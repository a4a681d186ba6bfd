"""Left-to-right decoding for causal backbones: greedy, or nucleus sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import SpecError, check_non_negative
from diffa.samplers.rng import sample_categorical, slot_uniform
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
        check_non_negative(temperature=temperature)
        if not 0 < top_p <= 1:
            raise SpecError(f"top_p must lie above 0 and up to 1, got {top_p}")
        self.vocab, self.temperature, self.top_p = vocab, temperature, top_p
        self.stop_at_eos = stop_at_eos

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Write the canvas's answers, yielding after every forward pass."""
        prompt = torch.arange(canvas.start, device=canvas.tokens.device)
        recompute = torch.where(canvas.valid[:, : canvas.start], prompt, -1)
        newest = recompute.amax(dim=1, keepdim=True)  # its logits predict the next token
        active = torch.ones_like(canvas.seeds, dtype=torch.bool)
        final = torch.zeros_like(canvas.answer, dtype=torch.bool)
        for place in range(canvas.length):
            slot = torch.where(active, canvas.start + place, -1)[:, None]
            tokens, confidence = self._next_token(denoise(recompute, newest), canvas.seeds, place)
            canvas.write(slot, tokens, confidence)
            final[:, place] = True
            if self.stop_at_eos:
                ended = active & (tokens[:, 0] == self.vocab.eos)
                after = torch.arange(canvas.length, device=slot.device) > place
                canvas.fill(ended[:, None] & after, self.vocab.eos)
                final |= ended[:, None]
                active = active & ~ended
            yield Step(canvas.answer.clone(), final.clone(), canvas.confidence.clone())
            if not bool(active.any()):
                return
            recompute = newest = torch.where(active[:, None], slot, -1)

    def _next_token(self, logits: Tensor, seeds: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Return a token (B, 1) and its probability from logits (B, 1, V)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = logits.softmax(dim=-1)
        if not self.temperature:
            confidence, tokens = probabilities.max(dim=-1)
            return tokens, confidence
        draws = slot_uniform(
            seeds, torch.full_like(seeds, place), torch.zeros_like(seeds)[:, None], stream=1
        )
        tokens = sample_categorical(self._nucleus(logits), self.temperature, draws)
        return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]

    def _nucleus(self, logits: Tensor) -> Tensor:
        """Exclude tokens outside the smallest set whose probabilities reach ``top_p``."""
        if self.top_p == 1:
            return logits
        ordered, order = (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        outside = (ordered.cumsum(dim=-1) - ordered) >= self.top_p
        return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
