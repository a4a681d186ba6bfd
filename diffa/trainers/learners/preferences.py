"""The learner ``preferences``: train a policy against the weights that the stage began with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from diffa.canvas.batch import forward_rows, unpad_embeds
from diffa.data.cache import FeatureCache
from diffa.data.collate import Batch, Collate
from diffa.data.rows import AnswerTransform, AudioTransform, PreferenceTransform
from diffa.runtime.precision import no_grad
from diffa.spec.schema import Report
from diffa.spec.spec import Spec
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.distributed import is_sharded
from diffa.trainers.learners.answers import audio_reader, encode
from diffa.trainers.learners.base import BatchLoss, Learner, RowTransform, StageCost
from diffa.trainers.trainable import set_eval_mode
from diffa.types import Noised, PairedObjective

if TYPE_CHECKING:
    from diffa.model import Model


class Reference:
    """The weights that a policy began with: copies of what is trained, not of the model.

    For DIFFA-2 these are the adapters and LoRA, 1.1 % of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._initial = [p.detach().clone() for p in self._trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the first weights in place for a while; no gradient is kept."""
        current = [p.data for p in self._trained]
        try:
            for p, initial in zip(self._trained, self._initial, strict=True):
                p.data = initial
            with no_grad():
                yield
        finally:
            for p, data in zip(self._trained, current, strict=True):
                p.data = data


class PreferenceLearner(Learner):
    """Train a model to prefer chosen answers by an objective that compares pairs (``vrpo``).

    Policy and reference both run without dropout, so that they differ by their weights alone and
    the first loss is log 2. Each recording is encoded once; hidden states meet the vocabulary
    where answers are masked. Rows come in pairs: chosen, rejected (``PreferenceTransform``).
    """

    paired: ClassVar[bool] = True

    def __init__(self, model: Model, stage: StageConfig, cache: FeatureCache | None = None) -> None:
        super().__init__()
        self.model, self.stage, self.cache = model, stage, cache
        self.reference = Reference(model)

    def row_transform(self, *, training: bool) -> RowTransform:
        """Return what makes rows of a chosen and a rejected answer."""
        rate: int = self.model.encoder.sample_rate
        answering = AnswerTransform(
            self.model.chat_format,
            self.model.backbone.vocab,
            AudioTransform(rate, None),
            answer_lengths=self.stage.answer_lengths,
            max_length=self.stage.max_seq_len,
        )
        return PreferenceTransform(
            answering, audio_reader(self.model, self.stage, training=training)
        )

    def collator(self) -> Collate:
        """Return what pads rows; the two answers of a pair keep their own lengths."""
        return Collate(self.model.backbone.vocab, learn_padding=False)

    def forward(self, batch: Batch) -> BatchLoss:
        """Measure a batch; every pair has the same weight.

        Raises:
            TrainingError: The weights are sharded, so that none can take their place.
        """
        if is_sharded(self.model):
            raise TrainingError(
                "a preference stage needs whole weights: go on with DDP, such as "
                "torchrun ... -m diffa train ... --resume"
            )
        rule = cast(PairedObjective, self.model.objective)
        noised = rule.draws(batch.tokens, batch.answer, batch.seeds)
        other = noised
        if not rule.shared_masks:
            other = rule.draws(batch.tokens, batch.answer, batch.seeds, apart=True)
        with self.reference.in_place():
            reference = self._bounds(batch, other)
        policy = self._bounds(batch, noised)
        preference = rule.compare(policy, reference)
        chosen, rejected = policy.view(-1, 2).unbind(1)
        lengths = batch.answer.sum(1).view(-1, 2)[:, 0]
        correct = (preference.margin > 0).float() + 0.5 * (preference.margin == 0).float()
        pairs = preference.loss.new_tensor(float(len(preference.loss)))
        metrics = {"margin": preference.margin, "chosen": chosen, "rejected": rejected}
        return BatchLoss(
            preference.loss.sum(),
            pairs,
            correct.sum(),
            pairs,
            rule.sft_weight * (-chosen / lengths).sum(),
            {name: value.detach().sum() for name, value in metrics.items()},
        )

    def _bounds(self, batch: Batch, noised: Noised) -> Tensor:
        """Bounds (2 P,) on the log-likelihood of each answer under the weights in place."""
        model, draws = self.model, len(noised.tokens) // len(batch.tokens)
        audio = None
        if batch.audio is not None:
            clips = unpad_embeds(model.adapt(encode(model, self.cache, batch)))
            audio = [clips[i] for i in batch.audio_index.tolist()] * draws
        at = None if batch.audio_at is None else batch.audio_at.repeat(draws)
        hidden = forward_rows(
            model.backbone, noised.tokens, batch.row_lengths.repeat(draws), audio, at
        )
        rule = cast(PairedObjective, model.objective)
        return rule.bounds(hidden, model.backbone.head, batch.tokens, noised)

    def train(self, mode: bool = True) -> PreferenceLearner:
        """Set the mode; dropout stays off, as it is off in the reference."""
        super().train(mode)
        for part in (self.model.encoder, self.model.backbone, *self.model.adapters.values()):
            set_eval_mode(part)
        return self

    @classmethod
    def check(
        cls, stage: StageConfig, path: str, spec: Spec, objective: type[Any], report: Report
    ) -> None:
        """Report an objective that compares no pairs."""
        if not getattr(objective, "paired", False):
            report(f"{path}.objective", "compares no pairs of answers; use objective: vrpo")

    @classmethod
    def cost(cls, stage: StageConfig, model: Model) -> StageCost:
        """Return the cost of a pair: two answers, each drawn several times, and the reference."""
        return StageCost(2, getattr(model.objective, "samples", 1), reference=True)
