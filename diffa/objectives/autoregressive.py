"""Next-token prediction over the answer, for causal backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.objectives.likelihood import token_nll
from diffa.objectives.measure import CountedLoss, MeasuredLoss, reduce_losses
from diffa.types import Decoding, Noised, Vocab


class Autoregressive(CountedLoss):
    """Predict every answer token from the tokens before it.

    Args:
        vocab: The backbone's vocabulary.
        normalization: Average the loss over the batch's answer tokens (batch), over samples
            (sample), or over rows by the weights of their tokens (row).
        eos_weight: Loss weight of EOS tokens relative to all others.
        chunk_size: Tokens whose logits are computed at a time. Default: fitted to 128 MiB of
            logits.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Decoding = "causal"

    def __init__(
        self,
        vocab: Vocab,
        *,
        normalization: Literal["batch", "sample", "row"] = "batch",
        eos_weight: float = 1.0,
        chunk_size: int | None = None,
    ) -> None:
        if not eos_weight > 0:
            raise SpecError(f"eos_weight must be positive, got {eos_weight}")
        if chunk_size is not None and chunk_size < 1:
            raise SpecError(f"chunk_size must be at least 1, got {chunk_size}")
        self.normalization, self.eos_weight = normalization, eos_weight
        self.chunk_size, self.eos = chunk_size, vocab.eos

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Return ``tokens`` (B, L) unchanged; all answer tokens but the first column count."""
        predicted = answer.clone()
        predicted[:, :1] = False  # no token stands before it
        weight = predicted.to(torch.float32)
        if self.eos_weight != 1.0:
            weight = torch.where(tokens == self.eos, self.eos_weight * weight, weight)
        return Noised(tokens, predicted, weight, answer)

    def measure(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> MeasuredLoss:
        """Return the loss of hidden (B, L, W), and how many answer tokens are correct."""
        predicted = noised.masked[:, 1:]  # hidden state i predicts token i + 1
        losses = token_nll(
            hidden[:, :-1][predicted], head, tokens[:, 1:][predicted], self.chunk_size
        )
        return reduce_losses(losses, noised, self.normalization)
