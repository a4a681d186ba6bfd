"""The masked-diffusion objective of LLaDA, which DIFFA trains with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffa.errors import SpecError, check_at_least
from diffa.objectives.cart import cart_weights
from diffa.objectives.likelihood import token_entropy, token_nll
from diffa.objectives.masking import (
    answer_blocks,
    mask_bernoulli,
    mask_complementary,
    mask_count,
)
from diffa.objectives.measure import CountedLoss, MeasuredLoss, Normalization, reduce_losses
from diffa.objectives.rng import row_uniform
from diffa.objectives.schedules import floor_level, noise_schedule
from diffa.objectives.time_sampling import TimeSampling, sample_times
from diffa.types import Decoding, Noised, Vocab


class Masked(CountedLoss):
    """Mask answer tokens at a random level and predict them, weighted by one over the level.

    The expectation is the evidence bound of LLaDA (arXiv 2502.09992, eq. 3), for the whole answer
    or block by block. ``full_mask_prob``, ``cart_p``, ``certainty_weight``, ``eos_weight`` and the
    normalizations ``masked`` and ``row`` give up the bound.

    Args:
        vocab: The backbone's vocabulary.
        schedule: Noise schedule from time to masking level (MD4, arXiv 2406.04329). Changes the
            variance of the loss, not its expectation.
        power: Exponent of the polynomial schedule.
        eps: Lowest masking level (LLaDA: 1e-3; LLaDA2: 0.3). Biases the bound by as much.
        max_level: Highest masking level (LLaDA2: 0.8). Needs ``masking: bernoulli``.
        masking: Mask each token independently (bernoulli), or an exact share of them (count), which
            has less variance.
        time_sampling: Noise times of a step's rows: independent, antithetic pairs, or
            low_discrepancy, spread evenly over the rows. The last two need consecutive seeds.
        complementary_masking: Train every row twice, on a set of masks and on all other tokens
            (LaViDa, arXiv 2505.16839). Needs ``masking: count``, or ``normalization: masked``
            (Fast-dLLM v2).
        block_length: Answer tokens per block for block diffusion, each with its own level (BD3-LM,
            arXiv 2503.09573). Default: the whole answer is one block.
        normalization: Average the loss over the batch's answer tokens (batch, DIFFA), over samples
            (sample, LLaDA), or unweighted over masked tokens (masked) or rows (row).
        cart_p: Weight tokens by nearby visible text instead of by level, with this geometric
            parameter (CART, Dream: 0.3). Default: off.
        certainty_weight: Weight of the entropy of correctly predicted tokens (certainty forcing,
            dParallel, arXiv 2509.26488). Default: off.
        certainty_temperature: Temperature of the entropy that ``certainty_weight`` adds.
        full_mask_prob: Share of rows whose whole answer is masked, at weight 1.
        eos_weight: Loss weight of EOS tokens relative to all others (LLaDA: 1). Below 1, padding
            after short answers counts less.
        chunk_size: Tokens whose logits are computed at a time. Default: fitted to 128 MiB of
            logits.

    Raises:
        SpecError: no mask in the vocabulary, a number out of its range, or options that do not
            combine.
    """

    decoding: Decoding = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        schedule: Literal["linear", "cosine", "polynomial", "geometric"] = "linear",
        power: float = 2.0,
        eps: float = 1e-3,
        max_level: float = 1.0,
        masking: Literal["bernoulli", "count"] = "bernoulli",
        time_sampling: TimeSampling = "independent",
        complementary_masking: bool = False,
        block_length: int | None = None,
        normalization: Normalization = "batch",
        cart_p: float = 0.0,
        certainty_weight: float = 0.0,
        certainty_temperature: float = 0.5,
        full_mask_prob: float = 0.0,
        eos_weight: float = 1.0,
        chunk_size: int | None = None,
    ) -> None:
        if vocab.mask is None:
            raise SpecError("the objective 'masked' needs a backbone whose vocabulary has a mask")
        for name, share in {"eps": eps, "cart_p": cart_p}.items():
            if not 0.0 <= share < 1.0:
                raise SpecError(f"{name} must lie in [0, 1), got {share}")
        if not 0.0 <= full_mask_prob <= 1.0:
            raise SpecError(f"full_mask_prob must lie in [0, 1], got {full_mask_prob}")
        check_at_least(1, chunk_size=chunk_size, block_length=block_length)
        if not eos_weight > 0:
            raise SpecError(f"eos_weight must be positive, got {eos_weight}")
        if certainty_weight < 0 or not certainty_temperature > 0:
            raise SpecError(
                "certainty_weight must be at least 0 and certainty_temperature above 0, "
                f"got {certainty_weight} and {certainty_temperature}"
            )
        if complementary_masking and masking != "count" and normalization != "masked":
            raise SpecError("complementary_masking needs masking: count or normalization: masked")
        if not eps < max_level <= 1.0:
            raise SpecError(f"max_level must lie in (eps, 1], got {max_level}")
        if max_level < 1.0 and masking != "bernoulli":
            raise SpecError("max_level needs masking: bernoulli")
        self.mask: int = vocab.mask
        self.eos, self.eos_weight, self.chunk_size = vocab.eos, eos_weight, chunk_size
        self.schedule, self.eps = noise_schedule(schedule, power), eps
        self.level_range = (max_level - eps) / (1.0 - eps)
        self.masking, self.time_sampling, self.block_length = masking, time_sampling, block_length
        self.complementary_masking, self.full_mask_prob = complementary_masking, full_mask_prob
        self.normalization, self.cart_p = normalization, cart_p
        self.certainty_weight = certainty_weight
        self.certainty_temperature = certainty_temperature

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Mask answer tokens of ``tokens`` (B, L); row b depends on ``seeds`` (B,) [b] only."""
        masked, weight, _ = self._draw(answer, seeds.to(tokens.device)[:, None])
        return self._noised(tokens, answer, masked, weight)

    def second(self, tokens: Tensor, noised: Noised, seeds: Tensor) -> Noised | None:
        """Return the complement's corruption if ``complementary_masking``: all other tokens."""
        if not self.complementary_masking:
            return None
        answer = noised.answer
        _, _, weight = self._draw(answer, seeds.to(tokens.device)[:, None])
        return self._noised(tokens, answer, answer & ~noised.masked, weight)

    def _draw(self, answer: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw masks; return them, their weights, and the weights of the complement, (B, L)."""
        blocks = answer_blocks(answer, self.block_length)
        # The n-th answer token of a row draws number n, wherever the answer starts.
        draws = row_uniform(seeds, torch.cumsum(answer, 1))
        t = sample_times(
            self.time_sampling, seeds, None if self.block_length is None else blocks.number
        )
        level, slope = self.schedule.level(t), self.schedule.slope(t)
        if self.complementary_masking and self.masking == "count":
            masked, weight, complement = mask_complementary(level, draws, answer, blocks)
        elif self.masking == "count":
            masked, weight = mask_count(level, draws, answer, blocks)
            complement = weight
        else:
            masked, weight = mask_bernoulli(
                floor_level(level * self.level_range, self.eps), draws, answer
            )
            complement = weight
        full = row_uniform(seeds, torch.full_like(seeds, -2)) < self.full_mask_prob
        masked = torch.where(full, answer, masked)
        # The complement of a full mask is empty: the first copy counts for both.
        full_weight = 2.0 if self.complementary_masking else 1.0
        return masked, torch.where(full, full_weight, slope * weight), slope * complement

    def _noised(self, tokens: Tensor, answer: Tensor, masked: Tensor, weight: Tensor) -> Noised:
        """Write the masks, and apply the options that change the weights."""
        if self.cart_p:
            weight = cart_weights(masked, answer, self.cart_p)
        elif self.normalization in ("masked", "row"):
            weight = torch.ones_like(weight)
        if self.eos_weight != 1.0:
            weight = torch.where(tokens == self.eos, self.eos_weight * weight, weight)
        noisy = torch.where(masked, torch.full_like(tokens, self.mask), tokens)
        return Noised(noisy, masked, weight * masked, answer)

    def measure(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> MeasuredLoss:
        """Return the loss of hidden (B, L, W), and how many masked tokens are correct."""
        states = hidden[noised.masked]
        losses = token_nll(states, head, tokens[noised.masked], self.chunk_size)
        measured = reduce_losses(losses, noised, self.normalization)
        if not self.certainty_weight:
            return measured
        entropy = token_entropy(
            states[losses.correct], head, self.certainty_temperature, self.chunk_size
        ).sum()
        return measured._replace(sum=measured.sum + self.certainty_weight * entropy)
