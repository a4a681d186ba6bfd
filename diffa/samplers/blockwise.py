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
    """Unmask blocks from left to right, several tokens per forward pass by an acceptance rule.

    The defaults are LLaDA's decoding loop, one token per pass. At most one of ``steps``,
    ``threshold``, ``factor`` and ``entropy_bound`` chooses how many tokens a pass accepts.

    Args:
        vocab: The backbone's vocabulary.
        block_length: Answer tokens per block (LLaDA, arXiv 2502.09992).
        steps: Denoising steps for the whole answer, divided among blocks by their length, at least
            one each (LLaDA). Default: one token per step.
        threshold: Accept every token whose probability reaches this value, and at least one per
            pass (Fast-dLLM, arXiv 2505.22618).
        factor: Accept the n most confident tokens while (n + 1)(1 - c_n) < factor (Fast-dLLM;
            DIFFA-2: 1.0).
        entropy_bound: Accept tokens of lowest entropy while the entropies before sum up to at most
            this many nats (EB sampler, arXiv 2505.24857).
        neighbor_threshold: With ``threshold``, a lower threshold within four positions of a token
            that reaches it (LocalLeap, arXiv 2510.07081).
        run_threshold: With ``threshold``, a lower threshold for the most confident token of each
            run of adjacent masks (dInfer, arXiv 2510.08666).
        kl_threshold: With ``threshold``, accept only tokens whose distribution moved by less than
            this many nats in each of the last two passes (KLASS, arXiv 2511.05664).
        credit_strength: Raise the logits of tokens that ranked first in earlier passes, by this
            factor (CreditDecoding, arXiv 2510.06133). Default: off.
        ranking: Order in which masked tokens are accepted: highest confidence, margin to the second
            token, lowest entropy, or random (LLaDA's ``remasking``, Dream's ``alg``).
        temperature: Sampling temperature. Default: take the most likely token.
        cfg_scale: Classifier-free guidance (LLaDA): logits are u + (cfg_scale + 1)(c - u). Doubles
            the work. Default: off.
        cfg_drop: What the unconditional pass leaves out: the prompt's text (DIFFA), the audio, or
            both.
        cache: Keys and values kept within a block: none, those before the block (prefix), or also
            those after it (dual; Fast-dLLM). Refreshed when a block begins.
        vicinity_window: With a cache, recompute this many slots on each side of the block too
            (dInfer's vicinity refresh).
        suffix_window: Attend to only the next N answer slots after the block, plus the last one
            (Streaming-dLLM, arXiv 2601.17917). Default: all.
        audio_refresh_interval: Recompute the audio's keys and values at most every N passes
            (dLLM-Cache, arXiv 2506.06295).
        drift_threshold: With a cache, refresh the prompt only if a sample of its keys moved by more
            than this cosine distance. Default: refresh at every block.
        stop_at_eos: End a row once all tokens before its first EOS are decided; the rest becomes
            EOS.

    Raises:
        SpecError: more than one rule, or a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block_length: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy_bound: float | None = None,
        neighbor_threshold: float | None = None,
        run_threshold: float | None = None,
        kl_threshold: float | None = None,
        credit_strength: float = 0.0,
        ranking: Order = "confidence",
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        cfg_drop: Literal["text", "audio", "both"] = "text",
        cache: Literal["none", "prefix", "dual"] = "none",
        vicinity_window: int = 0,
        suffix_window: int | None = None,
        audio_refresh_interval: int = 1,
        drift_threshold: float = 0.0,
        stop_at_eos: bool = True,
    ) -> None:
        self.rule = Rule(
            block_length=block_length, steps=steps, threshold=threshold, factor=factor, entropy_bound=entropy_bound,
            neighbor_threshold=neighbor_threshold, run_threshold=run_threshold, kl_threshold=kl_threshold,
        )  # fmt: skip
        self.rule.check_ranking(ranking)
        numbers = {
            "temperature": temperature,
            "cfg_scale": cfg_scale,
            "credit_strength": credit_strength,
        }
        for name, value in numbers.items():
            positive(name, value)
        slots.check(vicinity_window, suffix_window, audio_refresh_interval, drift_threshold, cache)
        if cfg_scale and drift_threshold:
            raise SpecError("drift_threshold and cfg_scale do not combine: leave one of them out")
        self.vocab, self.block_length, self.credit_strength = vocab, block_length, credit_strength
        self.ranking: Order = "entropy" if entropy_bound is not None else ranking
        self.temperature, self.cfg_scale, self.cfg_drop = temperature, cfg_scale, cfg_drop
        self.cache: slots.Cache = cache
        self.vicinity_window, self.suffix_window = vicinity_window, suffix_window
        self.audio_refresh_interval, self.drift_threshold, self.stop_at_eos = (
            audio_refresh_interval,
            drift_threshold,
            stop_at_eos,
        )

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        if self.cfg_scale:
            canvas.add_unconditional(self.cfg_drop)
        size = canvas.count, canvas.length, canvas.tokens.device
        memory, credit = self.rule.memory(*size), None
        if self.credit_strength:
            credit = Credit(*size, strength=self.credit_strength)

        def understand(logits: Tensor, place: Place) -> Predictions:
            logits = guided(logits, self.cfg_scale) if self.cfg_scale else logits
            logits = clean(logits, self.vocab.mask)
            return read(
                logits if credit is None else credit.raise_(logits, place),
                seeds=canvas.seeds,
                step=place.step,
                places=place.places,
                ranking=self.ranking,
                temperature=self.temperature,
            )

        return unmask(
            canvas,
            denoise,
            block_length=self.block_length,
            understand=understand,
            take=lambda predictions, place: self.rule.take(
                predictions, place, canvas.length, memory
            ),
            slots=slots.Slots(self._policies(canvas, denoise)),
            stop_at_eos=self.stop_at_eos,
        )

    def _policies(self, canvas: Canvas, denoise: Any) -> list[slots.Policy]:
        chosen: list[slots.Policy] = []
        if self.cache != "none":
            chosen.append(slots.Remembered(self.cache, self.vicinity_window))
        if self.suffix_window is not None:
            chosen.append(slots.Suffix(self.suffix_window))
        if self.audio_refresh_interval > 1:
            chosen.append(slots.LazyAudio(self.audio_refresh_interval, canvas))
        if self.drift_threshold:
            chosen.append(slots.Drift(self.drift_threshold, canvas, denoise.kv_cache))
        return chosen
