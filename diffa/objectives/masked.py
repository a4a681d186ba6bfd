"""The masked-diffusion objective of LLaDA (2502.09992, eq. 3) as DIFFA trains with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.objectives import masking as hiding
from diffa.objectives import schedules
from diffa.objectives.cart import cart as by_context
from diffa.objectives.levels import Levels, times
from diffa.objectives.likelihood import rows_entropy, rows_nll
from diffa.objectives.measure import Measure, pooled
from diffa.objectives.rng import uniform
from diffa.types import Decoding, Noised, Vocab


class Masked:
    """Mask answer tokens at a random level and restore them, weighted by one over the level.

    The expectation is the bound on the likelihood, of the whole answer or of its blocks in turn,
    but for ``full``, ``cart``, ``certainty``, ``padding`` and the normalizations ``masked`` and
    ``row``.

    Args:
        vocab: the backbone's vocabulary.
        schedule: how the level rises with time; the expectation is the same, the variance not.
        power: of the polynomial schedule.
        eps: lowest level (LLaDA: 1e-3); biases the bound by as much.
        masking: each token by itself (``bernoulli``), or an exact ``count`` of them: less variance.
        levels: of the rows: ``independent``, ``antithetic`` pairs, or ``spread`` evenly (low
            discrepancy); the latter two where rows of a step have consecutive seeds.
        complementary: pass every row twice, with a set masked and with the rest masked; audio is
            listened to once (LaViDa). Needs the masking ``count``.
        block: block diffusion (BD3-LM, 2503.09573): every block of so many answer tokens has its
            own level and sees the blocks before it unmasked; 1 is autoregression.
        normalization: divides the weighted sum by the batch's answer tokens (``batch``: DIFFA),
            takes the mean of per-sample means (``sample``: LLaDA), or leaves the level's weight
            out and takes the mean over masked tokens (``masked``: Whisper-LLaDA), or the mean of
            every row's mean over its masked tokens (``row``).
        cart: weigh tokens by the visible text around them instead of by the level (Dream: 0.3).
        certainty: weight of the entropy of tokens that are restored right, which trains for
            decoding several at once (certainty forcing: dParallel, 2509.26488).
        warmth: temperature of that entropy.
        full: share of the rows that are masked entirely, at weight 1.
        padding: weight of EOS tokens, relative to all others (LLaDA: 1); below it a short answer
            in a long room is not drowned by its padding.
        chunk: rows that meet the vocabulary at once.
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
        levels: Levels = "independent",
        complementary: bool = False,
        block: int | None = None,
        normalization: Literal["batch", "sample", "masked", "row"] = "batch",
        cart: float = 0.0,
        certainty: float = 0.0,
        warmth: float = 0.5,
        full: float = 0.0,
        padding: float = 1.0,
        chunk: int | None = None,
    ) -> None:
        if vocab.mask is None:
            raise SpecError("the objective 'masked' needs a backbone whose vocabulary has a mask")
        for name, share in {"eps": eps, "cart": cart}.items():
            if not 0.0 <= share < 1.0:
                raise SpecError(f"{name} must lie in [0, 1), got {share}")
        if not 0.0 <= full <= 1.0:
            raise SpecError(f"full must lie in [0, 1], got {full}")
        for name, value in {"chunk": chunk, "block": block}.items():
            if value is not None and value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        if not padding > 0:
            raise SpecError(f"padding must be positive, got {padding}")
        if certainty < 0 or not warmth > 0:
            raise SpecError(f"certainty and warmth must be positive, got {certainty} and {warmth}")
        if complementary and masking != "count":
            raise SpecError("complementary needs masking: count; see diffa.objectives.masking")
        self.mask: int = vocab.mask
        self.schedule = schedules.named(schedule, power)
        self.eps, self.masking, self.levels, self.block_length = eps, masking, levels, block
        self.complementary, self.normalization, self.cart = complementary, normalization, cart
        self.certainty, self.warmth, self.full, self.chunk = certainty, warmth, full, chunk
        self.padding, self.eos = padding, vocab.eos

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Mask answer tokens of ``tokens`` (B, L); row b draws from ``seeds`` (B,) [b] only."""
        masked, weight, _ = self._draw(answer, seeds.to(tokens.device)[:, None])
        return self._noised(tokens, answer, masked, weight)

    def second(self, tokens: Tensor, noised: Noised, seeds: Tensor) -> Noised | None:
        """With ``complementary``, the same answers with all else masked; the sums add up."""
        if not self.complementary:
            return None
        answer = noised.answer
        _, _, weight = self._draw(answer, seeds.to(tokens.device)[:, None])
        return self._noised(tokens, answer, answer & ~noised.masked, weight)

    def _draw(self, answer: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is masked, its weight, and the weight of all else in a second copy, (B, L) each."""
        block = hiding.blocks(answer, self.block_length)
        # the n-th answer token of its row, wherever that starts
        draws = uniform(seeds, torch.cumsum(answer, 1))
        t = times(self.levels, seeds, None if self.block_length is None else block.number)
        level, slope = self.schedule.level(t), self.schedule.slope(t)
        if self.complementary:
            masked, weight, other = hiding.halved(level, draws, answer, block)
        elif self.masking == "count":
            masked, weight = hiding.counted(level, draws, answer, block)
            other = weight
        else:
            level = schedules.floored(level, self.eps)
            masked, weight = hiding.independent(level, draws, answer)
            other = weight
        everything = uniform(seeds, torch.full_like(seeds, -2)) < self.full
        masked = torch.where(everything, answer, masked)
        whole = 2.0 if self.complementary else 1.0  # the other copy has nothing left to mask
        return masked, torch.where(everything, whole, slope * weight), slope * other

    def _noised(self, tokens: Tensor, answer: Tensor, masked: Tensor, weight: Tensor) -> Noised:
        if self.cart:
            weight = by_context(masked, answer, self.cart)
        elif self.normalization in ("masked", "row"):
            weight = torch.ones_like(weight)
        if self.padding != 1.0:
            weight = torch.where(tokens == self.eos, self.padding * weight, weight)
        noisy = torch.where(masked, torch.full_like(tokens, self.mask), tokens)
        return Noised(noisy, masked, weight * masked, answer)

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
        asked = hidden[noised.masked]
        rows = rows_nll(asked, head, tokens[noised.masked], self.chunk)
        found = pooled(rows, noised, self.normalization)
        if not self.certainty:
            return found
        doubt = rows_entropy(asked[rows.hits], head, self.warmth, self.chunk).sum()
        return found._replace(sum=found.sum + self.certainty * doubt)
