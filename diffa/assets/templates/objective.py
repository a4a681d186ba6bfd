"""An objective that masks answer tokens at a random level and restores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffa.errors import SpecError
from diffa.types import Noised, Vocab


class Part:
    """The bound of LLaDA (arXiv 2502.09992, eq. 3): tokens hidden at level t, weighed 1 / t."""

    decoding: Literal["masked"] = "masked"

    def __init__(self, vocab: Vocab, *, least: float = 1e-3) -> None:
        if vocab.mask is None:
            raise SpecError("this objective needs a backbone whose vocabulary has a mask")
        if not 0 < least < 1:
            raise SpecError(f"least must lie between 0 and 1, got {least}")
        self.mask: int = vocab.mask
        self.least = least

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Mask answer tokens of (B, L); row b draws from ``seeds[b]`` and nothing else."""
        weights = torch.zeros(tokens.shape)
        for row, seed in enumerate(seeds.tolist()):
            generator = torch.Generator().manual_seed(seed)
            level = self.least + (1 - self.least) * float(torch.rand((), generator=generator))
            there = answer[row].cpu()
            draws = torch.rand(int(there.sum()), generator=generator)
            weights[row, there] = (draws < level) / level
        weights = weights.to(tokens.device)
        masked = weights > 0
        return Noised(tokens.masked_fill(masked, self.mask), masked, weights, answer)

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of hidden (B, L, W), summed, and the answers' tokens."""
        logits = head(hidden[noised.masked]).float()  # the masked rows alone meet the vocabulary
        each = cross_entropy(logits, tokens[noised.masked], reduction="none")
        return (each * noised.weights[noised.masked]).sum(), noised.answer.sum()
