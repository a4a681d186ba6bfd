"""From the loss of single tokens to the loss of a batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from diffa.objectives.likelihood import Rows
from diffa.types import Noised


class Measure(NamedTuple):
    """A batch's summed loss, what to divide it by, and how many of its tokens were restored."""

    sum: Tensor
    weight: Tensor
    correct: Tensor
    masked: Tensor


def pooled(
    rows: Rows, noised: Noised, normalization: Literal["batch", "sample", "masked", "row"]
) -> Measure:
    """Weigh and sum the predicted tokens' losses; the divisor follows ``normalization``.

    ``batch``: answer tokens; ``sample``: rows, each token weighed by one over its row's answer
    tokens; ``masked``: predicted tokens; ``row``: rows with predicted tokens, each token weighed by
    its share of its row's weights.
    """
    weights = noised.weights[noised.masked]
    sizes = noised.answer.sum(1, keepdim=True)
    if normalization == "row":
        whole = (noised.weights * noised.masked).sum(1, keepdim=True)
        weights = weights / whole.expand_as(noised.weights)[noised.masked]
        divisor = noised.masked.any(1).sum()
    elif normalization == "sample":
        shares = noised.answer / sizes.clamp(min=1)
        weights = weights * shares[noised.masked]
        divisor = (sizes > 0).sum()
    else:
        divisor = sizes.sum() if normalization == "batch" else noised.masked.sum()
    total = (rows.nll * weights).sum()
    return Measure(total, divisor.to(total.dtype), rows.hits.sum(), noised.masked.sum())
