"""What a learner offers a training stage; the contract of the group ``diffa.learners``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from diffa.data.collate import Batch
from diffa.data.rows import TrainingDataset, TrainingRow
from diffa.data.samples import Sample
from diffa.spec.schema import Report
from diffa.spec.spec import Spec

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.trainers.config_sections import StageConfig

RowTransform = Callable[[Sample, int], TrainingRow]
"""Takes a sample and the seed of its row."""
Collator = Callable[[Sequence[TrainingRow]], Batch]


class BatchLoss(NamedTuple):
    """What a learner measures on one batch; all values are sums over the batch.

    Attributes:
        sum: Summed loss.
        weight: What ``sum`` is divided by. The trainer adds up both over accumulated batches and
            devices first, so that the split into batches changes no gradient.
        num_correct: Number of restored tokens.
        num_tokens: Number of predicted tokens; 0: no accuracy is reported.
        auxiliary: Further loss times ``weight``; trained on, reported apart.
        metrics: Further values to report, divided by ``weight``.
    """

    sum: Tensor
    weight: Tensor
    num_correct: Tensor
    num_tokens: Tensor
    auxiliary: Tensor
    metrics: Mapping[str, Tensor] | None = None


class StageCost(NamedTuple):
    """What a learner computes for each sample, for the estimate of a dry run.

    Attributes:
        answers: Answers per sample; 2 for pairs.
        corruptions: Corruptions of each answer in one pass.
        reference: Whether a copy of the trained weights is kept.
        packing_share: Share of the batches whose questions about one recording share a row.
        runs_backbone: Whether the backbone runs.
    """

    answers: int = 1
    corruptions: int = 1
    reference: bool = False
    packing_share: float = 0.0
    runs_backbone: bool = True


class Learner(nn.Module, ABC):
    """How a stage learns: from samples to rows, from rows to batches, from batches to a loss.

    A recipe names a learner by its entry point in the group ``diffa.learners``. The constructor
    is the schema of its options, as for every part: keyword-only parameters are options of the
    recipe, positional ones are given by name:

    - ``model``: the ``Model`` with the stage's adapters and objective; what the stage trains
      requires gradients.
    - ``stage``: the ``StageConfig``.
    - ``sources``: the stage's sources of samples.
    - ``cache``: the ``FeatureCache``, or None.

    The learner is the module that is optimized: parameters of its own are trained too, and
    dropped at the end of the stage unless they belong to the model. Subclass ``AnswerLearner`` to
    change the loss of an ordinary stage, or this class for anything else.

    Attributes:
        paired: Whether every manifest row needs a rejected answer.
        generates: Whether the model can answer, so that an evaluation may generate.
        find_unused_parameters: Whether some batches leave trained parameters out (DDP).
    """

    paired: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    find_unused_parameters: ClassVar[bool] = False

    @abstractmethod
    def row_transform(self, *, training: bool) -> RowTransform:
        """Return what makes a row of a sample; augment only rows for ``training``."""

    @abstractmethod
    def collator(self) -> Collator:
        """Return what makes a batch of rows."""

    @abstractmethod
    def forward(self, batch: Batch) -> BatchLoss:
        """Measure a batch, in training and in evaluation."""

    def prepare(self, stream: TrainingDataset, *, seed: int) -> None:
        """Initialise before the first step; a resumed run loads its weights afterwards.

        Args:
            stream: The rows of the stage.
            seed: The recipe's random seed.
        """

    @classmethod
    def check(
        cls, stage: StageConfig, path: str, spec: Spec, objective: type[Any], report: Report
    ) -> None:
        """Report what in a stage this learner cannot work with, when a recipe is read.

        Args:
            stage: The stage; ``stage.learner.options`` fit the constructor.
            path: Dotted path of the stage in the recipe.
            spec: The recipe's spec.
            objective: Class of the stage's objective.
            report: Called with the dotted path and the text of every fault.
        """

    @classmethod
    def cost(cls, stage: StageConfig, model: Model) -> StageCost:
        """Return what the learner computes for each sample of a stage."""
        return StageCost()
