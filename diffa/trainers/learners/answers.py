"""Learners: what a stage optimises, as a module from a batch to a summed loss and its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffa.canvas.batch import forward_rows
from diffa.data.cache import FeatureCache
from diffa.data.collate import Batch
from diffa.nano.alignment import Hinting
from diffa.nano.auxiliary import Saying, Script, numbered
from diffa.trainers.packing import Packing
from diffa.trainers.trainable import quieten
from diffa.types import BlockObjective, Decoding, Features, Noised


class Parts(NamedTuple):
    """What a batch measures.

    Attributes:
        sum: its summed loss.
        weight: what to divide that by.
        correct: tokens restored.
        asked: tokens asked for.
        extra: an auxiliary loss times ``weight``; learned from, reported apart.
        notes: whatever else is reported, each summed as the loss is.
    """

    sum: Tensor
    weight: Tensor
    correct: Tensor
    asked: Tensor
    extra: Tensor
    notes: Mapping[str, Tensor] | None = None


class Answers(nn.Module):
    """Trains a model by its objective: whatever of it learns, through whatever is frozen.

    Args:
        model: encoder, adapters, backbone and objective.
        cache: keeps a frozen encoder's features; None to compute them every time.
        script: reads the text that stands for audio, where rows have any.
        saying: what adapters should say besides, by CTC.
        packed: share of the batches trained on whose questions about one recording share a row;
            see ``trainers.packing``.
        hinting: teaches what the backbone has to work out, by labels.
    """

    def __init__(
        self,
        model: Any,
        cache: FeatureCache | None = None,
        script: Script | None = None,
        saying: Saying | None = None,
        *,
        packed: float = 0.0,
        hinting: Hinting | None = None,
    ) -> None:
        super().__init__()
        self.packed, self.hinting = packed, hinting
        self.model, self.cache, self.script, self.saying = model, cache, script, saying

    def forward(self, batch: Batch) -> Parts:
        """Measure a batch."""
        counting = Counting(self.model.objective)
        heard = self._heard(batch)
        with lent(self.model, objective=counting), ExitStack() as stack:
            if batch.audio_text is not None and self.script is not None:
                stack.enter_context(
                    lent(self.model, adapters=nn.ModuleDict({"script": self.script}))
                )
            said = stack.enter_context(self.saying.listening(self.model)) if self.saying else {}
            if self.hinting is not None:
                stack.enter_context(self.hinting.watching())
            packing = self._packing(batch)
            loss = self.model.loss(
                batch.tokens,
                batch.answer,
                batch.seeds,
                lengths=batch.row_lengths,
                forward=packing or forward_rows,
                **heard,
            )
        total, weight = loss[0], loss[1]
        extra = total.new_zeros(())
        if self.saying is not None and said:
            extra = self.saying.loss(said, batch.ctc_targets) * weight.detach()
        if self.hinting is not None and packing is not None:
            extra = extra + self.hinting.loss(batch, packing) * weight.detach()
        return Parts(total, weight, *counting.counted(total), extra)

    def _packing(self, batch: Batch) -> Packing | None:
        """Choose how a batch is read: by its seeds, which a resumed run meets again.

        Evaluation reads whole rows, as they are answered.
        """
        if self.training and self.packed:
            draw = np.random.default_rng(batch.seeds.tolist()).random()
            if draw < self.packed:
                return Packing(batch.audio_index)
        return None if self.hinting is None else Packing(None)

    def _heard(self, batch: Batch) -> dict[str, Any]:
        """Return what stands for the audio in a call of ``model.loss``."""
        heard: dict[str, Any] = {"audio_at": batch.audio_at, "owner": batch.audio_index}
        if batch.audio_text is not None and batch.audio_text_lengths is not None:
            blank = None if self.script is None else self.script.blank
            places = numbered(batch.audio_text, batch.speech_start, blank)
            states = (torch.stack([batch.audio_text, places], dim=2),)
            return heard | {
                "features": Features(states, batch.audio_text_lengths, batch.audio_text_lengths)
            }
        if batch.audio is None or batch.audio_lengths is None:
            return {}
        if self.cache is None:
            return heard | {"audio": (batch.audio, batch.audio_lengths)}
        with torch.no_grad():
            made = self.cache.features(self.model.encoder, batch.audio, batch.audio_lengths)
        return heard | {"features": made}

    def train(self, mode: bool = True) -> Answers:
        """Set the mode; parts that do not learn stay in evaluation mode."""
        super().train(mode)
        quieten(self.model)
        return self


@contextmanager
def lent(model: Any, **parts: Any) -> Iterator[None]:
    """Give a model other parts for a while."""
    kept = {name: getattr(model, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(model, name, part)
        yield
    finally:
        for name, part in kept.items():
            setattr(model, name, part)


class Counting:
    """An objective that also remembers how many tokens its last loss saw restored."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective
        self.decoding: Decoding = objective.decoding
        self.block_length: int | None = (
            objective.block_length if isinstance(objective, BlockObjective) else None
        )
        self.last: list[Tensor] | None = None

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Corrupt as the objective does."""
        noised: Noised = self.objective.corrupt(tokens, answer, seeds)
        return noised

    def second(self, tokens: Tensor, noised: Noised, seeds: Tensor) -> Noised | None:
        """Return the objective's second corruption, if it has one (``diffa.canvas.training``)."""
        second = getattr(self.objective, "second", None)
        return None if second is None else second(tokens, noised, seeds)

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the objective's loss, counting on the way if it can."""
        measure = getattr(self.objective, "measure", None)
        if measure is None:
            return tuple(self.objective.loss(hidden, head, tokens, noised))
        total, weight, *counts = measure(hidden, head, tokens, noised)
        before = self.last or [torch.zeros_like(count) for count in counts]
        self.last = [old + new for old, new in zip(before, counts, strict=True)]
        return total, weight

    def counted(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens restored and tokens asked for; zeros where the objective does not count."""
        if self.last is None:
            return like.new_zeros(()), like.new_zeros(())
        return self.last[0], self.last[1]
