"""The learner ``answers``: train a model by its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from diffa.canvas.batch import forward_rows
from diffa.data.augment import Augment
from diffa.data.cache import FeatureCache
from diffa.data.collate import Batch, Collate
from diffa.data.rows import AnswerTransform, AudioTransform
from diffa.runtime.precision import no_grad
from diffa.spec.schema import Report
from diffa.spec.spec import Spec
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config_sections import SHARE, StageConfig, check_range
from diffa.trainers.learners.base import BatchLoss, Learner, RowTransform, StageCost
from diffa.trainers.packing import Packing
from diffa.trainers.trainable import eval_frozen_parts
from diffa.types import Embeds, Features, Loss

if TYPE_CHECKING:
    from diffa.model import Model


class AnswerLearner(Learner):
    """Train a model by its objective: whatever of it is released, through whatever is frozen.

    Args:
        question_packing: Share of the batches whose questions about one recording share a row
            (``diffa.trainers.packing``).
    """

    def __init__(
        self,
        model: Model,
        stage: StageConfig,
        cache: FeatureCache | None = None,
        *,
        question_packing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.stage, self.cache = model, stage, cache
        self.question_packing = question_packing

    def row_transform(self, *, training: bool) -> RowTransform:
        """Return what makes rows of a prompt and its answer."""
        return self.answer_transform(audio_reader(self.model, self.stage, training=training))

    def answer_transform(self, reader: AudioTransform, **options: Any) -> AnswerTransform:
        """Return what makes rows, with further options of the row maker."""
        return AnswerTransform(
            self.model.chat_format,
            self.model.backbone.vocab,
            reader,
            answer_lengths=self.stage.answer_lengths,
            max_length=self.stage.max_seq_len,
            **options,
        )

    def collator(self) -> Collate:
        """Return what pads rows; pads are learned unless answers have a length of their own."""
        return Collate(self.model.backbone.vocab, learn_padding=not self.stage.answer_lengths)

    def forward(self, batch: Batch) -> BatchLoss:
        """Measure the objective on a batch.

        Raises:
            TrainingError: The rows have text in place of audio.
        """
        if batch.audio_text is not None:
            raise TrainingError("the learner 'answers' reads audio, not text in its place")
        embeds = None if batch.audio is None else self.model.adapt(self.features(batch))
        return batch_loss(self.objective_loss(batch, embeds, self.packing(batch)))

    def features(self, batch: Batch) -> Features:
        """Return the encoder's features of a batch's recordings."""
        return encode(self.model, self.cache, batch)

    def objective_loss(self, batch: Batch, embeds: Embeds | None, packing: Packing | None) -> Loss:
        """Return the objective's loss, given the embeddings of each recording."""
        return self.model.loss(
            batch.tokens,
            batch.answer,
            batch.seeds,
            lengths=batch.row_lengths,
            audio_at=None if embeds is None else batch.audio_at,
            embeds=embeds,
            owner=None if embeds is None else batch.audio_index,
            forward=packing or forward_rows,
        )

    def packing(self, batch: Batch) -> Packing | None:
        """Return how a batch is packed, or None; evaluation reads whole rows, as answers are.

        The draw depends on the batch's seeds alone, so that a resumed run repeats it.
        """
        if self.training and self.question_packing:
            draw = np.random.default_rng(batch.seeds.tolist()).random()
            if draw < self.question_packing:
                return Packing(batch.audio_index)
        return None

    def train(self, mode: bool = True) -> AnswerLearner:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        eval_frozen_parts(self.model)
        return self

    @classmethod
    def check(
        cls, stage: StageConfig, path: str, spec: Spec, objective: type[Any], report: Report
    ) -> None:
        """Report an objective that compares pairs, and a share out of range."""
        if getattr(objective, "paired", False):
            text = "the objective compares pairs of answers: use learner: preferences"
            report(f"{path}.learner", text)
        share = stage.learner.options.get("question_packing", 0.0)
        check_range(share, SHARE, f"{path}.learner.question_packing", report)

    @classmethod
    def cost(cls, stage: StageConfig, model: Model) -> StageCost:
        """Return the cost of a sample: packed questions share their recording."""
        return StageCost(packing_share=float(stage.learner.options.get("question_packing", 0.0)))


def audio_reader(model: Model, stage: StageConfig, *, training: bool) -> AudioTransform:
    """Return what reads a sample's audio, augmented for training."""
    rate = model.encoder.sample_rate
    return AudioTransform(
        rate, Augment(rate, **stage.augment) if training and stage.augment else None
    )


def encode(model: Model, cache: FeatureCache | None, batch: Batch) -> Features:
    """Return the features of a batch's recordings, from the cache if there is one."""
    assert batch.audio is not None and batch.audio_lengths is not None
    if cache is None:
        features: Features = model.encoder(batch.audio, batch.audio_lengths)
        return features
    with no_grad():
        return cache.features(model.encoder, batch.audio, batch.audio_lengths)


def batch_loss(loss: Loss, auxiliary: Tensor | None = None) -> BatchLoss:
    """Return an objective's loss as a learner's; ``auxiliary`` is a mean, not yet weighted."""
    zero = loss.sum.new_zeros(())
    return BatchLoss(
        loss.sum,
        loss.weight,
        zero if loss.num_correct is None else loss.num_correct,
        zero if loss.num_tokens is None else loss.num_tokens,
        zero if auxiliary is None else auxiliary,
    )
