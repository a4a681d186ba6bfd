"""Variance-reduced preference optimisation (LLaDA 1.5, arXiv 2505.19223), used by DIFFA-2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.errors import SpecError
from diffa.objectives.likelihood import token_nll
from diffa.objectives.masked import Masked
from diffa.runtime.rng import GOLDEN_GAMMA, splitmix64
from diffa.types import Decoding, Noised, Preference, Vocab

_APART = 1 << 40  # numbers from here on never meet those that start at 0


class VRPO:
    """Prefer chosen answers to rejected ones by Monte-Carlo bounds on their likelihoods.

    Each bound is the mean over ``samples`` draws: of A answer tokens exactly k are masked, k
    uniform in 1..A, and A / k times their summed log-likelihood counts. Chosen and rejected answers
    are masked independently. It also measures single answers (``corrupt`` and ``loss``); trainers
    of pairs call ``draws``, ``bounds`` and ``compare``.

    Args:
        vocab: The backbone's vocabulary; needs a mask token.
        samples: Monte-Carlo draws per answer (DIFFA-2: 4, LLaDA 1.5: 8).
        beta: Inverse strength of the preference, as in DPO: small values allow a policy far from
            the reference.
        sft_weight: Weight of the chosen answers' own loss per token (LLaDA 1.5: 0.05, DIFFA-2: 0).
        shared_masks: Mask policy and reference alike (antithetic sampling of LLaDA 1.5); false only
            for comparison.
        eps: Lowest masked share k / A that a weight A / k follows.
        chunk_size: Tokens whose logits are computed at a time. Default: fitted to 128 MiB of
            logits.

    Raises:
        SpecError: no mask in the vocabulary, or a number out of its range.
    """

    decoding: Decoding = "masked"
    paired = True  # rows come in pairs: chosen, rejected, chosen, rejected ...

    def __init__(
        self,
        vocab: Vocab,
        *,
        samples: int = 4,
        beta: float = 0.2,
        sft_weight: float = 0.0,
        shared_masks: bool = True,
        eps: float = 1e-3,
        chunk_size: int | None = None,
    ) -> None:
        if samples < 1:
            raise SpecError(f"samples must be at least 1, got {samples}")
        if not beta > 0:
            raise SpecError(f"beta must be above 0, got {beta}")
        if sft_weight < 0:
            raise SpecError(f"sft_weight must be at least 0, got {sft_weight}")
        if not 0.0 < eps <= 1.0:
            raise SpecError(f"eps must lie in (0, 1], got {eps}")
        if vocab.mask is None:
            raise SpecError("the objective 'vrpo' needs a backbone whose vocabulary has a mask")
        self._single = Masked(vocab, masking="count", chunk_size=chunk_size)
        self.samples, self.beta, self.sft_weight = samples, beta, sft_weight
        self.shared_masks, self.eps, self.chunk_size = shared_masks, eps, chunk_size

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Mask k of each row's answer tokens; row b of (B, L) depends on ``seeds`` [b] only."""
        noised = self._single.corrupt(tokens, answer, seeds)
        return noised._replace(weights=noised.weights.clamp(max=1.0 / self.eps))

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the summed bound on the answers' negative log-likelihood, and their tokens."""
        return self._single.loss(hidden, head, tokens, noised)

    def draws(
        self, tokens: Tensor, answer: Tensor, seeds: Tensor, *, apart: bool = False
    ) -> Noised:
        """Corrupt every row ``samples`` times.

        Args:
            tokens: (B, L).
            answer: (B, L) bool.
            seeds: (B,).
            apart: Draw independently of the draws without ``apart``.

        Returns:
            (samples * B, L), one draw of all rows after another.
        """
        numbers = torch.arange(self.samples, device=seeds.device) + (_APART if apart else 0)
        draws = [
            self.corrupt(tokens, answer, splitmix64(seeds.to(torch.int64) + salt))
            for salt in numbers * GOLDEN_GAMMA
        ]
        return Noised(*(torch.cat(parts) for parts in zip(*draws, strict=True)))

    def bounds(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> Tensor:
        """Return bounds (B,) in float32 on the log-likelihood of answers.

        Args:
            hidden: States of all draws, (draws * B, L, W), in the order of ``draws``.
            head: The backbone's head; computes logits of masked tokens only.
            tokens: The uncorrupted rows, (B, L).
            noised: The draws, (draws * B, L).
        """
        count = len(noised.tokens) // len(tokens)
        targets = tokens.repeat(count, 1)[noised.masked]
        losses = token_nll(hidden[noised.masked], head, targets, self.chunk_size)
        row = noised.masked.nonzero()[:, 0] % len(tokens)
        total = losses.nll.new_zeros(len(tokens))
        return total.index_add(0, row, -losses.nll * noised.weights[noised.masked]) / count

    def compare(self, policy: Tensor, reference: Tensor) -> Preference:
        """Compare the bounds (2 P,) of pairs: chosen, rejected, chosen, rejected ..."""
        gain = (policy - reference).view(-1, 2)
        margin = self.beta * (gain[:, 0] - gain[:, 1])
        return Preference(-F.logsigmoid(margin), margin)
