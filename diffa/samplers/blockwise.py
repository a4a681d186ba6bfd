"""Iterative unmasking in blocks, left to right: LLaDA's, DIFFA's and Fast-dLLM's decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers import recompute as slots
from diffa.samplers.acceptance import Rule, positive
from diffa.samplers.blocks import Place
from diffa.samplers.credit import Credit
from diffa.samplers.loop import unmask
from diffa.samplers.predictions import Order, Predictions, clean, guided, read
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Blockwise:
    """Unmask blocks from left to right, several tokens per forward by a rule.

    Args:
        vocab: the backbone's vocabulary.
        block: answer tokens per block.
        steps: forwards over the whole answer, spread over blocks by width, at least one each
            (LLaDA, arXiv 2502.09992). The default is one per token.
        threshold: instead, accept probabilities of at least this (Fast-dLLM, arXiv 2505.22618).
        factor: instead, accept n tokens while (n + 1)(1 - c_n) < factor (Fast-dLLM; DIFFA-2: 1.0).
        entropy: instead, accept while the summed entropy stays within this (EB, arXiv 2505.24857).
        leap: with a threshold, accept this much near a token that passes it (LocalLeap).
        spread: with a threshold, accept this much for the best of each run of masks (dInfer).
        stable: with a threshold, accept only what moved less than this in nats (KLASS).
        credit: raise tokens that kept leading, by this strength; 0 for none (CreditDecoding).
        order: what ranks masked tokens: probability, gap to the second, entropy, or chance.
        temperature: of the tokens; 0 takes the likeliest.
        guidance: 0 for none; logits are u + (guidance + 1)(c - u), u without its condition.
        unconditional: what u is without: the prompt's ``text`` (DIFFA), the ``audio``, or both.
        cache: ``none`` recomputes everything at every step; ``prefix`` remembers what lies before
            the block, ``dual`` also what lies behind it; both refresh as a block begins.
        vicinity: with a cache, positions around the block that are recomputed with it.
        suffix: answer slots behind the block that are seen, and the last; None for all.
        refresh_audio: recompute the audio's slots once in so many forwards at most.
        drift: with a cache, refresh the prompt only when its keys have moved by this; 0 always.
        stop: end a row when all tokens before its first EOS are decided; the rest becomes EOS.

    Raises:
        SpecError: more than one rule, or a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy: float | None = None,
        leap: float | None = None,
        spread: float | None = None,
        stable: float | None = None,
        credit: float = 0.0,
        order: Order = "confidence",
        temperature: float = 0.0,
        guidance: float = 0.0,
        unconditional: Literal["text", "audio", "both"] = "text",
        cache: Literal["none", "prefix", "dual"] = "none",
        vicinity: int = 0,
        suffix: int | None = None,
        refresh_audio: int = 1,
        drift: float = 0.0,
        stop: bool = True,
    ) -> None:
        self.rule = Rule(
            block=block, steps=steps, threshold=threshold, factor=factor, entropy=entropy,
            leap=leap, spread=spread, stable=stable,
        )  # fmt: skip
        self.rule.check_order(order)
        numbers = {"temperature": temperature, "guidance": guidance, "credit": credit}
        for name, value in numbers.items():
            positive(name, value)
        slots.check(vicinity, suffix, refresh_audio, drift, cache)
        if guidance and drift:
            raise SpecError("drift and guidance do not combine: leave one of them out")
        self.vocab, self.block, self.credit = vocab, block, credit
        self.order: Order = "entropy" if entropy is not None else order
        self.temperature, self.guidance, self.unconditional = temperature, guidance, unconditional
        self.cache: slots.Cache = cache
        self.vicinity, self.suffix = vicinity, suffix
        self.refresh_audio, self.drift, self.stop = refresh_audio, drift, stop

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        if self.guidance:
            canvas.branch(self.unconditional)
        size = canvas.count, canvas.length, canvas.tokens.device
        memory, credit = self.rule.memory(*size), None
        if self.credit:
            credit = Credit(*size, strength=self.credit)

        def understand(logits: Tensor, place: Place) -> Predictions:
            logits = guided(logits, self.guidance) if self.guidance else logits
            logits = clean(logits, self.vocab.mask)
            return read(
                logits if credit is None else credit.raise_(logits, place),
                seeds=canvas.seeds,
                step=place.step,
                places=place.places,
                order=self.order,
                temperature=self.temperature,
            )

        return unmask(
            canvas,
            denoise,
            block=self.block,
            understand=understand,
            take=lambda predictions, place: self.rule.take(
                predictions, place, canvas.length, memory
            ),
            slots=slots.Slots(self._policies(canvas, denoise)),
            stop=self.stop,
        )

    def _policies(self, canvas: Canvas, denoise: Any) -> list[slots.Policy]:
        chosen: list[slots.Policy] = []
        if self.cache != "none":
            chosen.append(slots.Remembered(self.cache, self.vicinity))
        if self.suffix is not None:
            chosen.append(slots.Suffix(self.suffix, canvas))
        if self.refresh_audio > 1:
            chosen.append(slots.LazyAudio(self.refresh_audio, canvas))
        if self.drift:
            chosen.append(slots.Drift(self.drift, canvas, denoise.kv_cache))
        return chosen
