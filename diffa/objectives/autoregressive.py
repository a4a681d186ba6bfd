"""Next-token prediction over the answer, for causal backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.objectives.likelihood import rows_nll
from diffa.objectives.measure import Measure, pooled
from diffa.types import Decoding, Noised, Vocab


class Autoregressive:
    """Predict every answer token from what stands before it.

    ``normalization``: per answer token of the batch (``batch``), or the mean of per-sample means
    (``sample``), or of every row's mean by the tokens' weights (``row``). ``padding``: weight of
    EOS tokens, relative to all others.
    """

    decoding: Decoding = "causal"

    def __init__(
        self,
        vocab: Vocab,
        *,
        normalization: Literal["batch", "sample", "row"] = "batch",
        padding: float = 1.0,
        chunk: int | None = None,
    ) -> None:
        if not padding > 0:
            raise SpecError(f"padding must be positive, got {padding}")
        if chunk is not None and chunk < 1:
            raise SpecError(f"chunk must be at least 1, got {chunk}")
        self.normalization, self.padding, self.chunk = normalization, padding, chunk
        self.eos = vocab.eos

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Leave ``tokens`` (B, L) as they are; answer tokens but the first column are predicted."""
        predicted = answer.clone()
        predicted[:, :1] = False  # nothing stands before it
        weight = predicted.to(torch.float32)
        if self.padding != 1.0:
            weight = torch.where(tokens == self.eos, self.padding * weight, weight)
        return Noised(tokens, predicted, weight, answer)

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss of hidden (B, L, W), whose row i predicts token i + 1."""
        measure = self.measure(hidden, head, tokens, noised)
        return measure.sum, measure.weight

    def measure(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> Measure:
        """Return ``loss`` together with how many answer tokens were predicted right."""
        ahead = noised.masked[:, 1:]
        rows = rows_nll(hidden[:, :-1][ahead], head, tokens[:, 1:][ahead], self.chunk)
        return pooled(rows, noised, self.normalization)
