"""The learner of a preference stage: a policy against the weights it began with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffa.canvas.batch import forward_rows, unpad_embeds
from diffa.data.cache import FeatureCache
from diffa.data.collate import Batch
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.distributed import is_split
from diffa.trainers.learners.answers import Parts
from diffa.trainers.trainable import still
from diffa.types import Features, Noised


class Reference:
    """The weights a policy began with: copies of what learns, not of the model.

    For DIFFA-2 these are the adapters and LoRA, 1.1 % of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._learning = [p for p in model.parameters() if p.requires_grad]
        self._frozen = [p.detach().clone() for p in self._learning]

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Put the first weights in place for a while; no gradient is kept."""
        kept = [p.data for p in self._learning]
        try:
            for p, frozen in zip(self._learning, self._frozen, strict=True):
                p.data = frozen
            with torch.no_grad():
                yield
        finally:
            for p, data in zip(self._learning, kept, strict=True):
                p.data = data


class Prefers(nn.Module):
    """Trains a model to prefer chosen answers by an objective that compares pairs (``vrpo``).

    Policy and reference both run without dropout, so that they differ by their weights alone and
    the first loss is log 2. Each recording is encoded once; hidden states meet the vocabulary
    where answers are masked. Rows come in pairs: chosen, rejected (see ``data.pairs``).

    Args:
        model: encoder, adapters, backbone and objective; what it is now is the reference.
        cache: keeps a frozen encoder's features; None to compute them every time.
    """

    def __init__(self, model: Any, cache: FeatureCache | None = None) -> None:
        super().__init__()
        self.model, self.cache = model, cache
        self.reference = Reference(model)

    def forward(self, batch: Batch) -> Parts:
        """Measure a batch; every pair weighs the same.

        Raises:
            TrainingError: weights are split over processes, so that none can stand in for them.
        """
        if is_split(self.model):
            raise TrainingError(
                "a preference stage needs whole weights: go on with DDP, such as "
                "torchrun ... -m diffa train ... --resume"
            )
        rule = self.model.objective
        noised = rule.draws(batch.tokens, batch.answer, batch.seeds)
        other = noised
        if not rule.shared_masks:
            other = rule.draws(batch.tokens, batch.answer, batch.seeds, apart=True)
        with self.reference.standing_in():
            before = self._bounds(batch, other)
        after = self._bounds(batch, noised)
        found = rule.compare(after, before)
        chosen, rejected = after.view(-1, 2).unbind(1)
        lengths = batch.answer.sum(1).view(-1, 2)[:, 0]
        right = (found.margin > 0).float() + 0.5 * (found.margin == 0).float()
        pairs = found.loss.new_tensor(float(len(found.loss)))
        notes = {"margin": found.margin, "chosen": chosen, "rejected": rejected}
        return Parts(
            found.loss.sum(),
            pairs,
            right.sum(),
            pairs,
            rule.sft_weight * (-chosen / lengths).sum(),
            {name: value.detach().sum() for name, value in notes.items()},
        )

    def _bounds(self, batch: Batch, noised: Noised) -> Tensor:
        """Bounds (2 P,) on the log-likelihood of each answer under the weights in place."""
        model, draws = self.model, len(noised.tokens) // len(batch.tokens)
        heard = None
        if batch.audio is not None:
            clips = unpad_embeds(model.adapt(self._features(batch)))
            heard = [clips[i] for i in batch.audio_index.tolist()] * draws
        at = None if batch.audio_at is None else batch.audio_at.repeat(draws)
        hidden = forward_rows(
            model.backbone, noised.tokens, batch.row_lengths.repeat(draws), heard, at
        )
        bounds: Tensor = model.objective.bounds(hidden, model.backbone.head, batch.tokens, noised)
        return bounds

    def _features(self, batch: Batch) -> Features:
        assert batch.audio is not None and batch.audio_lengths is not None
        made: Features
        if self.cache is not None:
            with torch.no_grad():
                return self.cache.features(self.model.encoder, batch.audio, batch.audio_lengths)
        made = self.model.encoder(batch.audio, batch.audio_lengths)
        return made

    def train(self, mode: bool = True) -> Prefers:
        """Set the mode; dropout stays off, as it is off in the reference."""
        super().train(mode)
        for part in (self.model.encoder, self.model.backbone, *self.model.adapters.values()):
            still(part)
        return self
