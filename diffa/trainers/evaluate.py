"""Evaluation during training: held-out loss, and generated answers compared with targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from diffa.data.rows import AudioTransform, TrainingDataset
from diffa.data.samples import Sample
from diffa.evaluation.word_errors import count_edits
from diffa.model import Model
from diffa.trainers.checkpoints import (
    WEIGHTS,
    TrainingError,
    load_json,
    replacing,
    save_json,
    save_weights,
)
from diffa.trainers.config_sections import EvaluationConfig
from diffa.trainers.distributed import barrier, broadcast_value, is_main_process
from diffa.trainers.learners.base import Learner
from diffa.trainers.trainable import trained_state
from diffa.trainers.trainer import LossMeter

EvaluationFunction = Callable[[Model], Mapping[str, float]]
"""Takes the model and returns metrics by name."""


class Evaluator:
    """Measure a learner on held-out rows.

    Args:
        learner: Measures the loss.
        model: Generates answers.
        stream: Held-out rows in a fixed order with fixed corruptions, or None.
        config: The recipe's ``evaluate``.
        functions: Functions of the model that return further metrics.
        device: Device of the batches.
    """

    def __init__(
        self,
        learner: Learner,
        model: Model,
        stream: TrainingDataset | None,
        config: EvaluationConfig,
        functions: Mapping[str, EvaluationFunction],
        device: torch.device,
    ) -> None:
        self.learner, self.model, self.stream = learner, model, stream
        self.config, self.functions, self.device = config, functions, device

    def __call__(self) -> dict[str, float]:
        """Return all metrics by name."""
        metrics: dict[str, float] = {}
        if self.stream is not None:
            metrics |= self._losses(self.stream)
            if self.config.generate and self.learner.generates:
                metrics |= self._answers(self.stream)
        for function in self.functions.values():
            metrics |= {key: float(value) for key, value in function(self.model).items()}
        return metrics

    def _losses(self, stream: TrainingDataset) -> dict[str, float]:
        meter, collate = LossMeter(), self.learner.collator()
        for batch in self._batches(len(stream)):
            meter.add(self.learner(collate([stream[i] for i in batch]).to(self.device)))
        return meter.pop()

    def _answers(self, stream: TrainingDataset) -> dict[str, float]:
        """Generate answers to the same rows and compare them with the targets."""
        answers: list[str] = []
        targets: list[str] = []
        for batch in self._batches(len(stream)):
            samples = [self._sample(stream, i) for i in batch]
            samples = [s for s in samples if s.audio_text is None]
            if not samples:
                continue
            audio = [None if s.audio is None else self._audio(s) for s in samples]
            questions = [s.question for s in samples]
            answer = self.model.answer(audio, questions, max_tokens=self.config.max_tokens)
            answers += list(answer.text)
            targets += [s.target for s in samples]
        return compare(answers, targets) if targets else {}

    def _batches(self, rows: int) -> list[range]:
        size = self.config.batch_size
        return [range(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _sample(self, stream: TrainingDataset, position: int) -> Sample:
        place = stream.mixture.draw(position)
        sample: Sample = stream.mixture.sources[place.source][place.row]
        return sample

    def _audio(self, sample: Sample) -> torch.Tensor:
        wave = AudioTransform(self.model.encoder.sample_rate)(sample, 0)
        assert wave is not None  # the sample has audio
        return wave.to(self.device)


class BestWeights:
    """Evaluate, and keep the weights of the best evaluation so far.

    Args:
        evaluate: Returns metrics by name.
        model: The model whose trained weights are kept.
        folder: The stage's folder; the weights go to its subfolder ``best``.
        metric: Name of the metric that decides.
        resume: Whether an earlier run's best value is continued from.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict[str, float]],
        model: nn.Module,
        folder: Path,
        metric: str,
        *,
        resume: bool,
    ) -> None:
        self.evaluate, self.model = evaluate, model
        self.folder, self.metric = folder / "best", metric
        note = load_json(self.folder / "metrics.json") if resume else None
        self.value: float | None = note["best"] if note else None

    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate at a step and return the metrics.

        Raises:
            TrainingError: The metric that decides is not measured.
        """
        metrics = self.evaluate()
        if self.metric not in metrics:
            raise TrainingError(
                f"evaluate.best_metric is {self.metric!r}, but what is measured is "
                f"{', '.join(metrics)}"
            )
        # Gathering weights needs all processes: let the first one's value decide for all.
        value = broadcast_value(metrics[self.metric])
        if is_better(self.metric, value, self.value):
            self.value = value
            state = trained_state(self.model)
            if is_main_process():
                with replacing(self.folder) as draft:
                    save_weights(state, draft / WEIGHTS)
                    save_json({"best": value, "step": step, **metrics}, draft / "metrics.json")
            barrier()  # other processes may read it next
        return metrics


def compare(answers: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Return the share of exact answers and word errors per target word.

    Case and punctuation do not count.
    """
    pairs = [(_words(a), _words(b)) for a, b in zip(answers, targets, strict=True)]
    errors = sum(count_edits(b, a).errors for a, b in pairs)
    words = sum(len(b) for _, b in pairs)
    exact = sum(a == b for a, b in pairs)
    return {"exact": exact / len(pairs), "error": errors / max(words, 1)}


def _words(text: str) -> list[str]:
    """Return a text's words without case and punctuation."""
    return "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()


def is_better(name: str, new: float, old: float | None) -> bool:
    """Return whether a metric has improved: losses and errors should fall, all others rise."""
    if old is None:
        return True
    lower_is_better = any(word in name for word in ("loss", "error"))
    return new < old if lower_is_better else new > old
