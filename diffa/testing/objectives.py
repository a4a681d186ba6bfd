"""Conformance of objectives: the corruption, the loss, and its expectation."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.testing.parts import PartSuite, close, ensure, noise, seeded
from diffa.testing.toy import CAUSAL, MASKED, WORDS
from diffa.types import Noised, Vocab

ROWS, LENGTH = 6, 11


class ObjectiveSuite(PartSuite):
    """Checks of an objective.

    Attributes:
        plain: Whether its loss is the cross-entropy when the whole answer is masked.
        unbiased: Whether its expectation is LLaDA's bound (arXiv 2502.09992, eq. 3): the sum over
            l of the mean loss of all sets of l masked tokens, divided by l.
        random: Whether different seeds corrupt differently.
    """

    kind: ClassVar[str] = "objective"
    plain: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False
    random: ClassVar[bool] = True

    @property
    def vocab(self) -> Vocab:
        """Return the toy vocabulary for the objective's decoding."""
        return CAUSAL if self.cls.decoding == "causal" else MASKED

    @property
    def offset(self) -> int:
        """Return how many columns before a token its predicting hidden state stands."""
        return int(self.cls.decoding == "causal")

    def new(self) -> Any:
        """Build the objective for the toy vocabulary."""
        return self.make(vocab=self.vocab)

    def test_it_declares_a_decoding(self) -> None:
        """``decoding`` is ``masked`` or ``causal``."""
        ensure(self.cls.decoding in ("masked", "causal"), f"decoding is {self.cls.decoding!r}")

    def test_only_answer_tokens_are_corrupted(self) -> None:
        """Only answer tokens become masks, and only they have a weight."""
        tokens, answer, seeds = _batch()
        before = tokens.clone()
        noised = self.new().corrupt(tokens, answer, seeds)
        ensure(torch.equal(tokens, before), "corrupt changes its argument `tokens` in place")
        ensure(torch.equal(noised.answer, answer), "noised.answer is not the answer")
        ensure(not (noised.masked & ~answer).any(), "tokens outside of the answer are predicted")
        changed = noised.tokens != tokens
        ensure(not (changed & ~answer).any(), "tokens outside of the answer are changed")
        if self.vocab.mask is not None:
            is_mask = noised.tokens[noised.masked] == self.vocab.mask
            ensure(is_mask.all(), "a predicted token is not masked")
        ensure(
            not noised.weights[~noised.masked].any(), "tokens that are not predicted have a weight"
        )
        ensure((noised.weights >= 0).all(), "a weight is negative")

    def test_seeds_reproduce(self) -> None:
        """Equal seeds corrupt equally, other seeds differently; no global generator is used."""
        tokens, answer, seeds = _batch()
        with seeded(1):
            state = torch.get_rng_state()
            first = self.new().corrupt(tokens, answer, seeds)
            ensure(torch.equal(state, torch.get_rng_state()), "torch's global generator was used")
        ensure(_same(first, self.new().corrupt(tokens, answer, seeds)), "the same seeds differ")
        others = [self.new().corrupt(tokens, answer, seeds + 7 * n) for n in range(1, 4)]
        differs = not all(torch.equal(first.masked, other.masked) for other in others)
        ensure(differs == self.random, f"random is {self.random}, but seeds matter: {differs}")

    def test_a_row_is_corrupted_alike_in_any_batch(self) -> None:
        """Other rows and padding do not change what is masked."""
        tokens, answer, seeds = _batch()
        together = self.new().corrupt(tokens, answer, seeds)
        for row in range(ROWS):
            one = slice(row, row + 1)
            wide, area = F.pad(tokens[one], (0, 4)), F.pad(answer[one], (0, 4))
            alone = self.new().corrupt(wide, area, seeds[one])
            ensure(torch.equal(alone.masked[0, :LENGTH], together.masked[row]),
                   f"row {row} is corrupted differently when it is alone")  # fmt: skip
            ensure(torch.equal(alone.weights[0, :LENGTH], together.weights[row]),
                   f"row {row} is weighted differently when it is alone")  # fmt: skip

    def test_the_loss_of_a_fully_masked_answer_is_cross_entropy(self) -> None:
        """With every answer token masked at weight 1, the loss is the mean cross-entropy."""
        tokens, answer, _ = _batch()
        tokens, answer = tokens[:1], answer[:1]
        hidden = noise(1, LENGTH, self.vocab.size, seed=2)
        total, weight = self.new().loss(hidden, _Head(), tokens, self._everything(tokens, answer))
        index = answer[0].nonzero()[:, 0]
        expected = F.cross_entropy(hidden[0, index - self.offset], tokens[0, index])
        same = close(total / weight, expected)
        ensure(same == self.plain, f"the loss is {float(total / weight)}, cross-entropy is "
               f"{float(expected)}, and plain is {self.plain}")  # fmt: skip

    def _everything(self, tokens: Tensor, answer: Tensor) -> Noised:
        noisy = tokens if self.vocab.mask is None else tokens.masked_fill(answer, self.vocab.mask)
        return Noised(noisy, answer, answer.float(), answer)

    def test_only_predicted_tokens_have_a_gradient(self) -> None:
        """Hidden states have a gradient exactly where they predict a token with a weight."""
        tokens, answer, seeds = _batch()
        objective = self.new()
        noised = objective.corrupt(tokens, answer, seeds)
        hidden = noise(ROWS, LENGTH, self.vocab.size, seed=2).requires_grad_()
        total, weight = objective.loss(hidden, _Head(), tokens, noised)
        ensure(total.dim() == 0 and bool(total.isfinite()), "the loss is not a finite scalar")
        ensure(
            weight.numel() == 1 and not weight.requires_grad,
            "the weight is not a scalar without gradient",
        )
        (gradient,) = torch.autograd.grad(total, hidden)
        predicting = (noised.masked & (noised.weights > 0)).roll(-self.offset, dims=1)
        nonzero = gradient.abs().sum(dim=-1) > 0
        ensure(not (nonzero & ~predicting).any(), "states that predict nothing have a gradient")
        ensure(not (predicting & ~nonzero).any(), "states that predict have no gradient")

    def test_other_states_and_tokens_do_not_change_the_loss(self) -> None:
        """States and tokens that predict nothing do not change the loss."""
        tokens, answer, seeds = _batch()
        objective = self.new()
        noised = objective.corrupt(tokens, answer, seeds)
        hidden = noise(ROWS, LENGTH, self.vocab.size, seed=2)
        predicting = noised.masked.roll(-self.offset, dims=1)
        other = torch.where(predicting[..., None], hidden, 40 * noise(*hidden.shape, seed=3))
        shuffled = torch.where(answer, tokens, (tokens + 1) % WORDS)
        first = objective.loss(hidden, _Head(), tokens, noised)
        again = objective.loss(other, _Head(), shuffled, noised)
        ensure(all(map(close, first, again)), "padding or the prompt changes the loss")

    def test_half_precision_states_are_accepted(self) -> None:
        """States in bfloat16 give nearly the float32 loss: sums run in float32."""
        tokens, answer, seeds = _batch()
        noised = self.new().corrupt(tokens, answer, seeds)
        hidden = noise(ROWS, LENGTH, self.vocab.size, seed=2)
        exact = self.new().loss(hidden, _Head(), tokens, noised)[0]
        rounded = self.new().loss(hidden.to(torch.bfloat16), _Head(), tokens, noised)[0]
        ensure(
            bool((exact - rounded).abs() <= 0.02 * exact.abs() + 1e-3),
            "the loss of bfloat16 states differs by more than rounding",
        )

    def test_the_expectation_is_the_bound(self) -> None:
        """The mean loss over many seeds equals enumeration of all masked sets, if ``unbiased``."""
        if self.vocab.mask is None:
            ensure(not self.unbiased, "a causal objective has nothing to enumerate")
            return
        groups, rows = 60, 500
        table = 2 * noise(8, 3, self.vocab.size, seed=6)  # logits of three tokens, by masked set
        tokens = torch.tensor([[0, 1, 2]]).expand(rows, -1)
        answer, objective, means = torch.ones_like(tokens).bool(), self.new(), []
        for group in range(groups):
            noised = objective.corrupt(tokens, answer, torch.arange(rows) + rows * group)
            sets = (noised.masked.long() * torch.tensor([4, 2, 1])).sum(dim=1)
            total, weight = objective.loss(table[sets], _Head(), tokens, noised)
            means.append(float(total / weight))
        losses = torch.tensor(means, dtype=torch.float64)
        bound = _bound(table) / 3
        off = abs(float(losses.mean()) - bound)
        allowed = 4 * float(losses.std()) / groups**0.5 + 0.01 * bound
        ensure((off <= allowed) == self.unbiased, f"the mean is {float(losses.mean()):.4f}, the "
               f"bound {bound:.4f}, and unbiased is {self.unbiased}")  # fmt: skip


class _Head(torch.nn.Module):
    """Return hidden states as logits."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden states (..., V) as they are."""
        return hidden


def _bound(table: Tensor) -> float:
    """Return the sum over l of the mean summed loss of all sets of l masked tokens, over l."""
    nll, total = -table.double().log_softmax(dim=-1), 0.0
    for size in (1, 2, 3):
        sums = []
        for masked in itertools.combinations(range(3), size):
            index = sum(4 >> place for place in masked)
            sums.append(sum(float(nll[index, place, place]) for place in masked))
        total += sum(sums) / len(sums) / size
    return total


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, answers that start and end at different places, and seeds."""
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    column = torch.arange(LENGTH)
    first, last = torch.tensor([2, 1, 3, 5, 2, 4]), torch.tensor([11, 9, 8, 10, 7, 11])
    answer = (column >= first[:, None]) & (column < last[:, None])
    return tokens, answer, torch.arange(ROWS) + 40


def _same(one: Noised, other: Noised) -> bool:
    return all(map(torch.equal, one, other))
