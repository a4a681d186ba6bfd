"""From the losses of single tokens to the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from diffa.objectives.likelihood import TokenLosses
from diffa.types import Noised

Normalization = Literal["batch", "sample", "masked", "row"]


class MeasuredLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        sum: Weighted sum of the token losses.
        weight: What to divide ``sum`` by.
        correct: Predicted tokens that have the highest logit.
        masked: Predicted tokens.
    """

    sum: Tensor
    weight: Tensor
    correct: Tensor
    masked: Tensor


class CountedLoss:
    """Base of objectives whose ``loss`` is the first half of their ``measure``."""

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the losses of hidden (B, L, W), and what to divide it by."""
        measured = self.measure(hidden, head, tokens, noised)
        return measured.sum, measured.weight

    def measure(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> MeasuredLoss:
        """Return ``loss`` and how many of the predicted tokens are correct."""
        raise NotImplementedError


def reduce_losses(
    losses: TokenLosses, noised: Noised, normalization: Normalization
) -> MeasuredLoss:
    """Weigh and sum the losses of the predicted tokens.

    Args:
        losses: Of the tokens where ``noised.masked``, row by row.
        noised: The corrupted batch.
        normalization: The divisor. ``batch``: answer tokens. ``sample``: rows, each token weighted
            by one over its row's answer tokens. ``masked``: predicted tokens. ``row``: rows with
            predicted tokens, each token weighted by its share of its row's weights.
    """
    weights = noised.weights[noised.masked]
    lengths = noised.answer.sum(1, keepdim=True)
    if normalization == "row":
        row_weights = (noised.weights * noised.masked).sum(1, keepdim=True)
        weights = weights / row_weights.expand_as(noised.weights)[noised.masked]
        divisor = noised.masked.any(1).sum()
    elif normalization == "sample":
        shares = noised.answer / lengths.clamp(min=1)
        weights = weights * shares[noised.masked]
        divisor = (lengths > 0).sum()
    else:
        divisor = lengths.sum() if normalization == "batch" else noised.masked.sum()
    total = (losses.nll * weights).sum()
    return MeasuredLoss(total, divisor.to(total.dtype), losses.correct.sum(), noised.masked.sum())
