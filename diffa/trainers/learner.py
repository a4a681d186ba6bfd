"""Learners: what a stage optimises, as a module from a batch to a summed loss and its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffa.data.cache import FeatureCache
from diffa.data.collate import Batch
from diffa.trainers.parts import quieten
from diffa.types import Decoding, Noised


class Parts(NamedTuple):
    """A batch's summed loss, what to divide it by, tokens restored, and tokens asked for."""

    sum: Tensor
    weight: Tensor
    correct: Tensor
    asked: Tensor


class Answers(nn.Module):
    """Trains a model by its objective: whatever of it learns, through whatever is frozen.

    Args:
        model: encoder, adapters, backbone and objective.
        cache: keeps a frozen encoder's features; None to compute them every time.
    """

    def __init__(self, model: Any, cache: FeatureCache | None = None) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, batch: Batch) -> Parts:
        """Measure a batch."""
        heard: dict[str, Any] = {}
        if batch.audio is not None and batch.lengths is not None:
            heard = {"audio_at": batch.audio_at, "audio": (batch.audio, batch.lengths)}
            if self.cache is not None:
                with torch.no_grad():
                    made = self.cache.features(self.model.encoder, batch.audio, batch.lengths)
                heard = {"audio_at": batch.audio_at, "features": made}
        lengths = torch.full_like(batch.seeds, batch.tokens.shape[1])
        counting = Counting(self.model.objective)
        kept, self.model.objective = self.model.objective, counting
        try:
            loss = self.model.loss(
                batch.tokens, batch.answer, batch.seeds, lengths=lengths, **heard
            )
        finally:
            self.model.objective = kept
        total, weight = loss[0], loss[1]
        return Parts(total, weight, *counting.counted(total))

    def train(self, mode: bool = True) -> Answers:
        """Set the mode; parts that do not learn stay in evaluation mode."""
        super().train(mode)
        quieten(self.model)
        return self


class Counting:
    """An objective that also remembers how many tokens its last loss saw restored."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective
        self.decoding: Decoding = objective.decoding
        self.last: tuple[Tensor, Tensor] | None = None

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Corrupt as the objective does."""
        noised: Noised = self.objective.corrupt(tokens, answer, seeds)
        return noised

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the objective's loss, counting on the way if it can."""
        measure = getattr(self.objective, "measure", None)
        if measure is None:
            return tuple(self.objective.loss(hidden, head, tokens, noised))
        total, weight, *self.last = measure(hidden, head, tokens, noised)
        return total, weight

    def counted(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens restored and tokens asked for; zeros where the objective does not count."""
        if self.last is None:
            return like.new_zeros(()), like.new_zeros(())
        return self.last[0], self.last[1]
