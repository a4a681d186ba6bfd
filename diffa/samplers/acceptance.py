"""The rule of a sampler: which masked tokens to accept, from its options."""

from __future__ import annotations

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers import selection as select
from diffa.samplers.blocks import Place
from diffa.samplers.predictions import Order, Predictions
from diffa.samplers.stability import Stability
from diffa.samplers.transfer_schedule import even


class Rule:
    """One of steps, threshold, factor and entropy; a threshold may be refined by one of leap,
    spread and stable. See ``Blockwise`` for their meaning.

    Raises:
        SpecError: more than one rule, or a number out of its range.
    """

    def __init__(
        self,
        *,
        block_length: int,
        steps: int | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy_bound: float | None = None,
        neighbor_threshold: float | None = None,
        run_threshold: float | None = None,
        kl_threshold: float | None = None,
    ) -> None:
        self.block_length, self.steps = block_length, steps
        self.threshold, self.factor, self.entropy_bound = threshold, factor, entropy_bound
        self.neighbor_threshold, self.run_threshold, self.kl_threshold = (
            neighbor_threshold,
            run_threshold,
            kl_threshold,
        )
        rules = {
            "steps": steps,
            "threshold": threshold,
            "factor": factor,
            "entropy_bound": entropy_bound,
        }
        self.kind = _one({k: v for k, v in rules.items() if v is not None}) or "steps"
        finer = {
            "neighbor_threshold": neighbor_threshold,
            "run_threshold": run_threshold,
            "kl_threshold": kl_threshold,
        }
        self.finer = _one({k: v for k, v in finer.items() if v is not None})
        if self.finer and threshold is None:
            raise SpecError(f"{self.finer} refines a threshold: set threshold as well")
        for name, value in {
            "block_length": block_length,
            "steps": 1 if steps is None else steps,
        }.items():
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        for name, share in {
            "threshold": threshold,
            "neighbor_threshold": neighbor_threshold,
            "run_threshold": run_threshold,
        }.items():
            if share is not None and not 0 <= share <= 1:
                raise SpecError(f"{name} must lie between 0 and 1, got {share}")
        for name, number in {
            "factor": factor,
            "entropy_bound": entropy_bound,
            "kl_threshold": kl_threshold,
        }.items():
            positive(name, number)

    def check_ranking(self, ranking: Order) -> None:
        """Refuse an order that gives the rule nothing to test."""
        if self.kind in ("threshold", "factor") and ranking in ("entropy", "random"):
            raise SpecError(
                f"ranking: {ranking!r} gives no probability to compare with {self.kind}; "
                "use confidence or margin"
            )
        if self.kind == "entropy_bound" and ranking not in ("confidence", "entropy"):
            raise SpecError(
                f"ranking: entropy_bound always ranks by entropy; leave out {ranking!r}"
            )

    def memory(self, count: int, length: int, device: torch.device) -> Stability | None:
        """What the rule remembers between the steps of one answer."""
        return None if self.kl_threshold is None else Stability(count, length, device)

    def take(
        self, predictions: Predictions, place: Place, length: int, memory: Stability | None
    ) -> Tensor:
        """Which of the asked slots to accept now, (B, R) bool."""
        score, masked = predictions.score, place.masked
        if self.threshold is not None:
            if self.neighbor_threshold is not None:
                return select.leap(
                    score, masked, place.places, self.threshold, self.neighbor_threshold
                )
            if self.run_threshold is not None:
                return select.spread(
                    score, masked, place.places, self.threshold, self.run_threshold
                )
            if memory is not None and self.kl_threshold is not None:
                moved = memory.observe(predictions, place)
                return select.stable(score, masked, moved, self.threshold, self.kl_threshold)
            return select.threshold(score, masked, self.threshold)
        if self.factor is not None:
            return select.factor(score, masked, self.factor)
        if self.entropy_bound is not None:
            return select.entropy_bound(-score, masked, self.entropy_bound)
        return select.fixed(score, masked, self.quota(place, length))

    def quota(self, place: Place, length: int) -> Tensor:
        """Tokens per row (B,) by the fixed schedule."""
        return even(
            place.block,
            place.since,
            place.due,
            steps=self.steps,
            length=length,
            width=self.block_length,
        )


def positive(name: str, value: float | None) -> None:
    """Refuse a number that is negative, infinite or not a number."""
    if value is not None and not 0 <= value < float("inf"):
        raise SpecError(f"{name} must be 0 or more, got {value}")


def _one(options: dict[str, float]) -> str | None:
    if len(options) > 1:
        raise SpecError(f"choose one of {' and '.join(options)}: each decides how many tokens")
    return next(iter(options), None)
