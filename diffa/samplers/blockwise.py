"""Iterative unmasking in blocks, left to right: the decoding of LLaDA, DIFFA and Fast-dLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from diffa.errors import SpecError, check_non_negative
from diffa.samplers.acceptance import AcceptanceRule, FactorRule
from diffa.samplers.blocks import BlockState, BlockTracker, fill_after_eos, make_step
from diffa.samplers.credit import Credit
from diffa.samplers.predictions import Predictions, Ranking, apply_cfg, exclude_mask, predict
from diffa.samplers.recompute import (
    AudioRefresh,
    BlockCache,
    CacheMode,
    DriftRefresh,
    RecomputePolicy,
    RecomputeSlots,
    SuffixWindow,
    check_recompute_options,
)
from diffa.samplers.stability import Stability
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas
    from diffa.canvas.denoiser import Denoiser


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
        factor_rule: ``paper`` takes the largest n with (n + 1)(1 - c_n) < factor. ``released`` is
            the loop of Fast-dLLM and DIFFA-2. It also accepts all masks where only the least
            confident one fails.
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
        factor_rule: FactorRule = "paper",
        entropy_bound: float | None = None,
        neighbor_threshold: float | None = None,
        run_threshold: float | None = None,
        kl_threshold: float | None = None,
        credit_strength: float = 0.0,
        ranking: Ranking = "confidence",
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        cfg_drop: Literal["text", "audio", "both"] = "text",
        cache: CacheMode = "none",
        vicinity_window: int = 0,
        suffix_window: int | None = None,
        audio_refresh_interval: int = 1,
        drift_threshold: float = 0.0,
        stop_at_eos: bool = True,
    ) -> None:
        self.rule = AcceptanceRule(
            block_length=block_length, steps=steps, threshold=threshold, factor=factor,
            factor_rule=factor_rule, entropy_bound=entropy_bound, run_threshold=run_threshold,
            neighbor_threshold=neighbor_threshold, kl_threshold=kl_threshold,
        )  # fmt: skip
        self.rule.check_ranking(ranking)
        check_non_negative(
            temperature=temperature, cfg_scale=cfg_scale, credit_strength=credit_strength
        )
        check_recompute_options(
            vicinity_window=vicinity_window, suffix_window=suffix_window, cache=cache,
            audio_refresh_interval=audio_refresh_interval, drift_threshold=drift_threshold,
        )  # fmt: skip
        if cfg_scale and drift_threshold:
            raise SpecError("drift_threshold and cfg_scale do not combine: leave one of them out")
        self.vocab, self.block_length, self.credit_strength = vocab, block_length, credit_strength
        self.ranking: Ranking = "entropy" if entropy_bound is not None else ranking
        self.temperature, self.cfg_scale, self.cfg_drop = temperature, cfg_scale, cfg_drop
        self.cache: CacheMode = cache
        self.vicinity_window, self.suffix_window = vicinity_window, suffix_window
        self.audio_refresh_interval = audio_refresh_interval
        self.drift_threshold, self.stop_at_eos = drift_threshold, stop_at_eos

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the masks of the canvas's answers, yielding after every forward pass."""
        stability = None if self.rule.kl_threshold is None else Stability(canvas)
        return self.unmask(
            canvas,
            denoise,
            lambda predictions, state: self.rule.accept(predictions, state, stability),
        )

    def unmask(
        self,
        canvas: Canvas,
        denoise: Denoise,
        accept: Callable[[Predictions, BlockState], Tensor],
    ) -> Iterator[Step]:
        """Run the decoding loop with any acceptance rule; other samplers build on it.

        Args:
            canvas: What to fill. Between two passes the caller may mask tokens again.
            denoise: Runs one forward pass of the backbone.
            accept: Returns which masked slots (B, R) to accept now.
        """
        if self.cfg_scale:
            canvas.add_unconditional(self.cfg_drop)  # rows, then their unconditional twins
        fixed = ~canvas.undecided()  # answer tokens of the caller stay as they are
        blocks = BlockTracker(canvas, self.block_length)
        recompute_slots = RecomputeSlots(self._policies(canvas, denoise))
        credit = Credit(canvas, strength=self.credit_strength) if self.credit_strength else None
        # Each row decodes its leftmost block with masks; rows advance independently.
        while (state := blocks.current()) is not None:
            # Slots not recomputed come from the KV cache; ``write`` keeps this pass's keys in it.
            recompute, write = recompute_slots(canvas, state)
            # Logits (B, R, V) of the block's masks; (2 B, R, V) with unconditional twins.
            logits = denoise(recompute, state.masked_slots, write=write)
            if self.cfg_scale:
                logits = apply_cfg(logits, self.cfg_scale)
            logits = exclude_mask(logits, self.vocab.mask)
            if credit is not None:
                logits = credit.boost(logits, state)
            predictions = predict(
                logits, seeds=canvas.seeds, step=state.step, places=state.places,
                ranking=self.ranking, temperature=self.temperature,
            )  # fmt: skip
            # Accepted tokens are written once; all other slots of the block stay masks.
            accepted = torch.where(accept(predictions, state), state.masked_slots, -1)
            canvas.write(accepted, predictions.tokens, predictions.confidence)
            if self.stop_at_eos:
                fill_after_eos(canvas, fixed)
            blocks.advance()
            yield make_step(canvas, draft=fixed if self.stop_at_eos else None)

    def _policies(self, canvas: Canvas, denoise: Denoise) -> list[RecomputePolicy]:
        """Build the policies that the options ask for."""
        policies: list[RecomputePolicy] = []
        if self.cache != "none":
            policies.append(BlockCache(self.cache, self.vicinity_window))
        if self.suffix_window is not None:
            policies.append(SuffixWindow(self.suffix_window))
        if self.audio_refresh_interval > 1:
            policies.append(AudioRefresh(self.audio_refresh_interval, canvas))
        if self.drift_threshold:
            # Only a KV cache knows how far keys have moved: the model's ``denoise`` has one.
            denoiser = cast("Denoiser", denoise)
            policies.append(DriftRefresh(self.drift_threshold, canvas, denoiser.kv_cache))
        return policies
