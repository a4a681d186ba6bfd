"""Iterative unmasking in blocks, left to right: the decoding of LLaDA, DIFFA and Fast-dLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from diffa.errors import SpecError, check_non_negative
from diffa.samplers.acceptance import AcceptanceRule, FactorRule
from diffa.samplers.block_memory import BlockMemory, block_width
from diffa.samplers.blocks import (
    BlockState,
    BlockTracker,
    fill_after_block,
    fill_after_eos,
    make_step,
)
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

    With a block-causal backbone the blocks are the backbone's, or parts of them where
    ``block_length`` is smaller, and ``cache`` is exact: ``none`` gives the same tokens as
    ``prefix``.

    Args:
        vocab: The backbone's vocabulary.
        block_length: Answer tokens per block (LLaDA, arXiv 2502.09992).
        steps: Denoising steps for the whole answer, divided among blocks by their length, at least
            one each (LLaDA). Default: one token per step.
        steps_per_block: Accept an equal share of the block in so many passes, whatever part of it
            is prompt (SDAR). With ``threshold``, all tokens above it where they are at least as
            many (SDAR's dynamic rule, LLaDA2.0).
        minimal_topk: Lower ``steps_per_block`` to one per this many tokens of the answer
            (LLaDA2.0).
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
            token, lowest entropy, random (LLaDA's ``remasking``, Dream's ``alg``), or left_to_right
            (SDAR's sequential rule).
        temperature: Sampling temperature. Default: take the most likely token.
        confidence_temperature: Temperature of the probabilities that rules compare (SDAR).
        cfg_scale: Classifier-free guidance (LLaDA): logits are u + (cfg_scale + 1)(c - u). Doubles
            the work. Default: off.
        cfg_drop: What the unconditional pass leaves out: the prompt's text (DIFFA), the audio, or
            both.
        cache: Keys and values kept within a block: none, those before the block (prefix), or also
            those after it (dual; Fast-dLLM). Refreshed when a block begins. With a block-causal
            backbone ``prefix`` is exact, and ``dual`` keeps the rest of its block (Fast-dLLM v2).
        merge_commit: Store a finished block of a block-causal backbone in the first pass of the
            next block, not in a pass of its own.
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
        eos_check: When ``stop_at_eos`` looks for it: after every pass, after passes that write an
            EOS (LLaDA2.0), or after complete blocks (SDAR).

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
        steps_per_block: int | None = None,
        minimal_topk: int = 1,
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
        confidence_temperature: float = 1.0,
        cfg_scale: float = 0.0,
        cfg_drop: Literal["text", "audio", "both"] = "text",
        cache: CacheMode = "none",
        merge_commit: bool = True,
        vicinity_window: int = 0,
        suffix_window: int | None = None,
        audio_refresh_interval: int = 1,
        drift_threshold: float = 0.0,
        stop_at_eos: bool = True,
        eos_check: Literal["pass", "written", "block"] = "pass",
    ) -> None:
        self.rule = AcceptanceRule(
            block_length=block_length, steps=steps, threshold=threshold, factor=factor,
            steps_per_block=steps_per_block, minimal_topk=minimal_topk,
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
        if not confidence_temperature > 0:
            raise SpecError(
                f"confidence_temperature must be positive, got {confidence_temperature}"
            )
        self.vocab, self.block_length, self.credit_strength = vocab, block_length, credit_strength
        self.ranking: Ranking = "entropy" if entropy_bound is not None else ranking
        self.temperature, self.cfg_scale, self.cfg_drop = temperature, cfg_scale, cfg_drop
        self.cache: CacheMode = cache
        self.confidence_temperature, self.merge_commit = confidence_temperature, merge_commit
        self.eos_check = eos_check
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
            masks_again=False,
        )

    def unmask(
        self,
        canvas: Canvas,
        denoise: Denoise,
        accept: Callable[[Predictions, BlockState], Tensor],
        *,
        masks_again: bool = True,
    ) -> Iterator[Step]:
        """Run the decoding loop with any acceptance rule; other samplers build on it.

        Args:
            canvas: What to fill. Between two passes the caller may mask tokens again.
            denoise: Runs one forward pass of the backbone.
            accept: Returns which masked slots (B, R) to accept now.
            masks_again: Whether the caller masks tokens again.
        """
        if self.cfg_scale:
            canvas.add_unconditional(self.cfg_drop)  # rows, then their unconditional twins
        fixed = ~canvas.undecided()  # answer tokens of the caller stay as they are
        width = block_width(canvas, self.block_length)
        memory = self._memory(canvas, width)
        policies = self._policies(canvas, denoise, memory)
        # Where nothing but masks changes within a block, a GPU runs through it without waiting.
        steady = memory is None and all(isinstance(policy, BlockCache) for policy in policies)
        hold = steady and not masks_again and canvas.tokens.is_cuda
        blocks = BlockTracker(canvas, width, hold=hold)
        recompute_slots = RecomputeSlots(policies, hold=hold)
        credit = Credit(canvas, strength=self.credit_strength) if self.credit_strength else None
        # Each row decodes its leftmost block with masks; rows advance independently.
        while (state := blocks.current()) is not None:
            commits: Tensor | None = None
            if memory is not None:
                state, commits = memory.narrow(state)
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
                confidence_temperature=self.confidence_temperature,
            )  # fmt: skip
            # Accepted tokens are written once; all other slots of the block stay masks.
            accepted = torch.where(accept(predictions, state), state.masked_slots, -1)
            canvas.write(accepted, predictions.tokens, predictions.confidence)
            if self.stop_at_eos:
                self._stop(canvas, state, accepted, fixed)
            # A pass that only commits is no step of its block.
            blocks.advance(1 if commits is None else (~commits).long())
            yield make_step(canvas, draft=fixed if self.stop_at_eos else None)

    def _stop(self, canvas: Canvas, state: BlockState, accepted: Tensor, fixed: Tensor) -> None:
        """Fill what follows a row's first EOS, where ``eos_check`` looks for it."""
        if self.eos_check == "pass":
            fill_after_eos(canvas, fixed)
        elif self.eos_check == "written":
            slots = accepted.clamp(min=0)
            wrote = (accepted >= 0) & (
                canvas.tokens[: canvas.count].gather(1, slots) == canvas.vocab.eos
            )
            fill_after_eos(canvas, fixed | ~wrote.any(dim=1, keepdim=True))
        if self.eos_check != "pass":
            fill_after_block(canvas, state)

    def _memory(self, canvas: Canvas, width: int) -> BlockMemory | None:
        """Return the memory of a block-causal canvas, None for any other."""
        if canvas.attention is None:
            return None
        if self.suffix_window is not None or self.vicinity_window or self.drift_threshold:
            raise SpecError(
                "suffix_window, vicinity_window and drift_threshold refresh what a bidirectional "
                "backbone forgets: leave them out with a block-causal one"
            )
        if self.rule.steps is not None:
            raise SpecError(
                "steps counts blocks from the prompt's end, a block-causal backbone does not: set "
                "steps_per_block instead"
            )
        return BlockMemory(canvas, width, cache=self.cache, merge_commit=self.merge_commit)

    def _policies(
        self, canvas: Canvas, denoise: Denoise, memory: BlockMemory | None
    ) -> list[RecomputePolicy]:
        """Build the policies that the options ask for."""
        if memory is not None:
            return [] if self.cache == "none" else [memory]
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
