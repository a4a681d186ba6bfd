"""The masked-diffusion objective of LLaDA (2502.09992, eq. 3) as DIFFA trains with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.objectives import schedules
from diffa.objectives.draws import uniform
from diffa.objectives.likelihood import rows_nll
from diffa.objectives.measure import Measure, pooled
from diffa.types import Decoding, Noised, Vocab


class Masked:
    """Mask answer tokens at a random level and restore them, weighted by one over the level.

    ``normalization`` divides the weighted sum by the batch's answer tokens (``batch``: DIFFA),
    takes the mean of per-sample means (``sample``: LLaDA), or leaves the weights out and takes
    the mean over masked tokens (``masked``: Whisper-LLaDA; no bound on the likelihood).
    ``full`` masks that share of the rows entirely, which no longer is a bound either.
    """

    decoding: Decoding = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        schedule: Literal["linear", "cosine", "polynomial", "geometric"] = "linear",
        power: float = 2.0,
        eps: float = 1e-3,
        masking: Literal["bernoulli", "count"] = "bernoulli",
        normalization: Literal["batch", "sample", "masked"] = "batch",
        full: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        if vocab.mask is None:
            raise SpecError("the objective 'masked' needs a backbone whose vocabulary has a mask")
        if not 0.0 <= eps < 1.0:
            raise SpecError(f"eps must lie in [0, 1), got {eps}")
        if not 0.0 <= full <= 1.0:
            raise SpecError(f"full must lie in [0, 1], got {full}")
        if chunk is not None and chunk < 1:
            raise SpecError(f"chunk must be at least 1, got {chunk}")
        self.mask: int = vocab.mask
        self.schedule = schedules.named(schedule, power)
        self.eps, self.masking, self.normalization = eps, masking, normalization
        self.full, self.chunk = full, chunk

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Mask answer tokens of ``tokens`` (B, L); row b draws from ``seeds`` (B,) [b] only."""
        seeds = seeds.to(tokens.device)[:, None]
        place = torch.cumsum(answer, 1)  # the n-th answer token of its row, wherever that starts
        draws = uniform(seeds, place)
        t = uniform(seeds, torch.full_like(seeds, -1))
        form = self._counted if self.masking == "count" else self._independent
        masked, weight = form(t, draws, answer)
        everything = uniform(seeds, torch.full_like(seeds, -2)) < self.full
        masked = torch.where(everything, answer, masked)
        weight = torch.where(everything, torch.ones_like(weight), weight)
        if self.normalization == "masked":
            weight = torch.ones_like(weight)
        noisy = torch.where(masked, torch.full_like(tokens, self.mask), tokens)
        return Noised(noisy, masked, weight * masked, answer)

    def _independent(self, t: Tensor, draws: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Mask each answer token with probability p(t), weighed by slope(t) / p(t)."""
        level = schedules.floored(self.schedule.level(t), self.eps)
        return answer & (draws < level), self.schedule.slope(t) / level

    def _counted(self, t: Tensor, draws: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Mask exactly l of A answer tokens, weighed by slope(t) A / l: less variance.

        l = ceil(level(t) A), and slope(t) dt = d level, so every l in 1..A weighs the same.
        """
        size = answer.sum(1, keepdim=True)
        count = torch.ceil(self.schedule.level(t) * size).clamp(min=1)
        rank = draws.masked_fill(~answer, 2.0).argsort(stable=True, dim=1).argsort(dim=1)
        return answer & (rank < count), self.schedule.slope(t) * size / count

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of hidden (B, L, W), summed, and what to divide it by."""
        measure = self.measure(hidden, head, tokens, noised)
        return measure.sum, measure.weight

    def measure(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> Measure:
        """Return ``loss`` together with how many masked tokens were restored."""
        rows = rows_nll(hidden[noised.masked], head, tokens[noised.masked], self.chunk)
        return pooled(rows, noised, self.normalization)
