"""Evaluation during training: held-out loss, and answers written and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffa.data.collate import Collate
from diffa.data.rows import TrainingDataset
from diffa.data.samples import Sample
from diffa.evaluation.word_errors import count_edits
from diffa.trainers.checkpoints import (
    WEIGHTS,
    TrainingError,
    load_json,
    replacing,
    save_json,
    save_weights,
)
from diffa.trainers.config_sections import Evaluation
from diffa.trainers.distributed import agreed, leads, wait
from diffa.trainers.trainable import learned
from diffa.trainers.trainer import Tally

Evaluator = Callable[[Any], Mapping[str, float]]
_FALLING = ("loss", "error")


class Held:
    """Measures a learner on rows it does not learn from.

    Args:
        learner: gives losses.
        model: writes answers.
        stream: held-out rows in a fixed order, each with a fixed corruption.
        chosen: how many rows, and what to do with them.
        evaluators: functions of the model that return more numbers.
    """

    def __init__(
        self,
        learner: Any,
        model: Any,
        stream: TrainingDataset | None,
        collate: Collate,
        chosen: Evaluation,
        evaluators: Mapping[str, Evaluator],
        device: torch.device,
    ) -> None:
        self.learner, self.model, self.stream = learner, model, stream
        self.collate, self.chosen, self.device = collate, chosen, device
        self.evaluators = {name: evaluators[name] for name in chosen.by}

    def __call__(self, step: int) -> dict[str, float]:
        """Return every number of this evaluation."""
        found: dict[str, float] = {}
        if self.stream is not None:
            found |= self._losses(self.stream)
            if self.chosen.generate:
                found |= self._answers(self.stream)
        for evaluator in self.evaluators.values():
            found |= {key: float(value) for key, value in evaluator(self.model).items()}
        return found

    def _losses(self, stream: TrainingDataset) -> dict[str, float]:
        tally = Tally()
        for start in range(0, len(stream), self.chosen.batch):
            rows = range(start, min(start + self.chosen.batch, len(stream)))
            tally.add(self.learner(self.collate([stream[i] for i in rows]).to(self.device)))
        return tally.take()

    def _answers(self, stream: TrainingDataset) -> dict[str, float]:
        written, wanted = [], []
        for start in range(0, len(stream), self.chosen.batch):
            rows = range(start, min(start + self.chosen.batch, len(stream)))
            samples = [self._sample(stream, i) for i in rows]
            asked = [s for s in samples if s.audio_text is None]
            if not asked:
                continue
            waves = [None if s.audio is None else self._wave(s) for s in asked]
            questions = [s.question for s in asked]
            answer = self.model.answer(waves, questions, max_tokens=self.chosen.max_tokens)
            written += list(answer.text)
            wanted += [s.target for s in asked]
        return compare(written, wanted) if wanted else {}

    def _sample(self, stream: TrainingDataset, position: int) -> Sample:
        place = stream.mixture.draw(position)
        sample: Sample = stream.mixture.sources[place.source][place.row]
        return sample

    def _wave(self, sample: Sample) -> torch.Tensor:
        from diffa.data.rows import AudioTransform

        wave = AudioTransform(self.model.encoder.sample_rate)(sample, 0)
        assert wave is not None
        return wave.to(self.device)


class Best:
    """An evaluation that also keeps the weights of its best moment."""

    def __init__(
        self, held: Any, model: Any, folder: Path, chosen: Evaluation, *, fresh: bool
    ) -> None:
        self.held, self.model, self.place, self.name = held, model, folder / "best", chosen.best
        note = None if fresh else load_json(self.place / "metrics.json")
        self.value: float | None = note["best"] if note else None

    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate; a missing number that was to be the best's measure is an error."""
        found: dict[str, float] = self.held(step)
        if self.name not in found:
            raise TrainingError(
                f"evaluate.best is {self.name!r}, but what is measured is {', '.join(found)}"
            )
        value = agreed(found[self.name])  # what follows, all do together or none
        if better(self.name, value, self.value):
            self.value = value
            state = learned(self.model)
            if leads():
                with replacing(self.place) as draft:
                    save_weights(state, draft / WEIGHTS)
                    save_json({"best": value, "step": step, **found}, draft / "metrics.json")
            wait()  # others may read it next
        return found


def compare(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return the share of exact answers and word errors per wanted word, case and marks aside."""
    pairs = [(plain(a), plain(b)) for a, b in zip(written, wanted, strict=True)]
    errors = sum(count_edits(b, a).errors for a, b in pairs)
    words = sum(len(b) for _, b in pairs)
    exact = sum(a == b for a, b in pairs)
    return {"exact": exact / len(pairs), "error": errors / max(words, 1)}


def plain(text: str) -> list[str]:
    """Return a text's words without case and punctuation."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return kept.split()


def better(name: str, new: float, old: float | None) -> bool:
    """Whether a number has improved: losses and errors fall, everything else rises."""
    if old is None:
        return True
    falls = any(word in name for word in _FALLING)
    return new < old if falls else new > old
