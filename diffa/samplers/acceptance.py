"""The acceptance rule of a sampler: which masked tokens to accept, from its options."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffa.errors import SpecError, check_at_least, check_non_negative, check_shares
from diffa.samplers import selection
from diffa.samplers.blocks import BlockState
from diffa.samplers.predictions import Predictions, Ranking
from diffa.samplers.stability import Stability
from diffa.samplers.transfer_schedule import num_transfer_tokens, planned_tokens

FactorRule = Literal["paper", "released"]


class AcceptanceRule:
    """At most one of ``steps``, ``threshold``, ``factor`` and ``entropy_bound``; a threshold may
    be refined by one of four more. ``Blockwise`` documents the options.

    Raises:
        SpecError: more than one rule, or a number out of its range.
    """

    def __init__(
        self,
        *,
        block_length: int,
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
    ) -> None:
        self.block_length, self.steps, self.threshold = block_length, steps, threshold
        self.factor, self.factor_rule, self.entropy_bound = factor, factor_rule, entropy_bound
        self.neighbor_threshold, self.run_threshold = neighbor_threshold, run_threshold
        self.kl_threshold = kl_threshold
        self.steps_per_block, self.minimal_topk = steps_per_block, minimal_topk
        self.kind = _only_one(
            steps=steps, threshold=threshold, factor=factor, entropy_bound=entropy_bound
        )
        planned = None if threshold is None else steps_per_block
        refinement = _only_one(
            neighbor_threshold=neighbor_threshold, run_threshold=run_threshold,
            kl_threshold=kl_threshold, steps_per_block=planned,
        )  # fmt: skip
        if steps_per_block is not None and self.kind not in (None, "threshold"):
            raise SpecError(f"choose one of steps_per_block and {self.kind}")
        if minimal_topk != 1 and steps_per_block is None:
            raise SpecError("minimal_topk bounds steps_per_block: set it as well")
        if refinement and threshold is None:
            raise SpecError(f"{refinement} refines a threshold: set threshold as well")
        check_at_least(1, block_length=block_length, steps=steps, minimal_topk=minimal_topk)
        check_at_least(1, steps_per_block=steps_per_block)
        check_shares(
            threshold=threshold, neighbor_threshold=neighbor_threshold, run_threshold=run_threshold
        )
        check_non_negative(factor=factor, entropy_bound=entropy_bound, kl_threshold=kl_threshold)

    def check_ranking(self, ranking: Ranking) -> None:
        """Raise SpecError for a ranking whose scores the rule cannot test."""
        unscored = ("entropy", "random", "left_to_right")
        if self.kind in ("threshold", "factor") and ranking in unscored:
            raise SpecError(
                f"ranking: {ranking!r} gives no probability to compare with {self.kind}; "
                "use confidence or margin"
            )
        if self.kind == "entropy_bound" and ranking not in ("confidence", "entropy"):
            raise SpecError(
                f"ranking: entropy_bound always ranks by entropy; leave out {ranking!r}"
            )

    def accept(
        self, predictions: Predictions, state: BlockState, stability: Stability | None = None
    ) -> Tensor:
        """Return which masked slots to accept in this pass, (B, R) bool.

        Args:
            predictions: The pass's predictions for the masked slots of the block.
            state: The block of each row.
            stability: Earlier predictions of the same canvas; needed for ``kl_threshold``.
        """
        score, masked = predictions.score, state.masked
        if self.steps_per_block is not None:
            steps = min(self.steps_per_block, max(1, state.requested // self.minimal_topk))
            counts = planned_tokens(state, steps)
            return selection.select_planned(score, masked, counts, self.threshold)
        if self.threshold is not None:
            if self.neighbor_threshold is not None:
                return selection.select_local_leap(
                    score, masked, state.places, self.threshold, self.neighbor_threshold
                )
            if self.run_threshold is not None:
                return selection.select_runs(
                    score, masked, state.places, self.threshold, self.run_threshold
                )
            if self.kl_threshold is not None and stability is not None:
                divergence = stability.update(predictions, state)
                return selection.select_klass(
                    score, masked, divergence, self.threshold, self.kl_threshold
                )
            return selection.select_threshold(score, masked, self.threshold)
        if self.factor is not None:
            released = self.factor_rule == "released"
            return selection.select_factor(score, masked, self.factor, released=released)
        if self.entropy_bound is not None:
            return selection.select_entropy_bound(-score, masked, self.entropy_bound)
        counts = num_transfer_tokens(state, self.steps, self.block_length)
        return selection.select_top_k(score, masked, counts)


def _only_one(**options: float | None) -> str | None:
    """Return the name of the option that is set, None if none is."""
    names = [name for name, value in options.items() if value is not None]
    if len(names) > 1:
        raise SpecError(f"choose one of {' and '.join(names)}: each decides how many tokens")
    return names[0] if names else None
