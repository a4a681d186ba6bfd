"""Properties of corruption and of the masked loss, for every schedule and both ways of masking."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffa.objectives.masked import Masked
from diffa.objectives.rng import row_uniform
from diffa.objectives.schedules import floor_level, noise_schedule
from diffa.types import Noised, Vocab

VOCAB = Vocab(size=11, eos=8, pad=8, mask=10)
NAMES = ["linear", "cosine", "polynomial", "geometric"]
names = st.sampled_from(NAMES)
masking = st.sampled_from(["bernoulli", "count"])
few = settings(max_examples=25, deadline=None)


class Case(NamedTuple):
    tokens: torch.Tensor
    answer: torch.Tensor
    seeds: torch.Tensor


@st.composite
def cases(draw) -> Case:
    rows = draw(st.integers(1, 5))
    width = draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 10, (rows, width), generator=g)
    answer = torch.rand(rows, width, generator=g) < draw(st.floats(0, 1))
    seeds = torch.randint(0, 2**62, (rows,), generator=g)
    return Case(tokens, answer, seeds)


@given(names, st.floats(0.3, 4.0))
@few
def test_alpha_falls_from_one_to_zero(name: str, power: float) -> None:
    t = torch.linspace(0, 1, 400, dtype=torch.float64)
    alpha = 1 - noise_schedule(name, power).level(t)
    assert torch.allclose(alpha[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-9)
    assert bool((alpha.diff() <= 0).all())


@given(names, st.floats(0.3, 4.0), st.floats(0.02, 0.98))
@few
def test_weight_is_the_derivative_over_the_masked_share(name: str, power: float, at: float) -> None:
    schedule, h = noise_schedule(name, power), 1e-6
    t = torch.tensor([at - h, at, at + h], dtype=torch.float64)
    alpha = 1 - schedule.level(t)
    numeric = -(alpha[2] - alpha[0]) / (2 * h) / (1 - alpha[1])
    assert torch.allclose((schedule.slope(t) / schedule.level(t))[1], numeric, rtol=1e-4, atol=1e-6)


@given(st.floats(0, 1), st.floats(0, 0.5))
@few
def test_noise_floor_keeps_levels_between_eps_and_one(level: float, eps: float) -> None:
    floored = floor_level(torch.tensor(level, dtype=torch.float64), eps)
    assert eps - 1e-12 <= floored <= 1 + 1e-12
    assert torch.allclose(floored, torch.tensor((1 - eps) * level + eps, dtype=torch.float64))


@given(names, masking)
@few
def test_masked_share_equals_the_level(name: str, form: str) -> None:
    rows, size = 400, 64
    objective = Masked(VOCAB, schedule=name, masking=form)
    answer = torch.ones(rows, size, dtype=torch.bool)
    seeds = torch.arange(rows)
    noised = objective.corrupt(torch.zeros(rows, size, dtype=torch.long), answer, seeds)
    t = row_uniform(seeds, torch.full_like(seeds, -1))
    level = floor_level(objective.schedule.level(t), objective.eps)
    # five standard errors of a mean of binomial shares; a count is rounded up by half a token
    allowed = 5 * (level * (1 - level) / size / rows).mean().sqrt() + (form == "count") * 0.6 / size
    assert abs(noised.masked.float().mean() - level.mean()) < allowed
    within = (noised.masked.float().mean(1) - level).abs()
    assert bool((within < 5 * (level * (1 - level) / size).sqrt() + 2 / size).all())


@given(cases(), names, masking)
@few
def test_only_answer_tokens_are_masked(case: Case, name: str, form: str) -> None:
    noised = Masked(VOCAB, schedule=name, masking=form).corrupt(*case)
    assert not bool((noised.masked & ~case.answer).any())
    assert torch.equal(noised.tokens[~noised.masked], case.tokens[~noised.masked])
    assert bool((noised.tokens[noised.masked] == VOCAB.mask).all())
    assert not bool(noised.weights[~noised.masked].any())
    assert bool((noised.weights[noised.masked] > 0).all())


@given(cases(), names, masking, st.integers(0, 7))
@few
def test_a_row_is_corrupted_alike_whatever_stands_beside_it(
    case: Case, name: str, form: str, shift: int
) -> None:
    objective = Masked(VOCAB, schedule=name, masking=form)
    together = objective.corrupt(*case)
    again = objective.corrupt(*case)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for b in range(len(case.tokens)):
        # alone, after a longer prompt, before padding that is no answer
        tokens = nn.functional.pad(case.tokens[b : b + 1], (shift, 3))
        answer = nn.functional.pad(case.answer[b : b + 1], (shift, 3))
        alone = objective.corrupt(tokens, answer, case.seeds[b : b + 1])
        inner = slice(shift, shift + case.tokens.shape[1])
        assert torch.equal(alone.masked[0, inner], together.masked[b])
        assert torch.equal(alone.weights[0, inner], together.weights[b])


def test_seeds_change_the_corruption() -> None:
    answer = torch.ones(64, 32, dtype=torch.bool)
    noised = Masked(VOCAB).corrupt(torch.zeros(64, 32, dtype=torch.long), answer, torch.arange(64))
    assert len(noised.masked.unique(dim=0)) > 56


def test_draws_are_uniform_and_independent() -> None:
    draws = row_uniform(torch.arange(500)[:, None], torch.arange(500)[None])
    assert draws.min() > 0 and draws.max() < 1
    share = torch.histc(draws, 50, 0, 1) / draws.numel()
    assert (share - 0.02).abs().max() < 5 * (0.02 / draws.numel()) ** 0.5
    for axis in (0, 1):
        near, far = draws.narrow(axis, 0, 499).flatten(), draws.narrow(axis, 1, 499).flatten()
        assert abs(torch.corrcoef(torch.stack([near, far]))[0, 1]) < 0.01


def exact_bound(cost: torch.Tensor) -> float:
    """Sum over mask sizes l of the mean S(m) over all masks of that size, divided by l."""
    size = cost.shape[0]
    total = 0.0
    for count in range(1, size + 1):
        subsets = list(itertools.combinations(range(size), count))
        summed = sum(float(cost[list(s)].sum() * (1 + 0.3 * len(s))) for s in subsets)
        total += summed / len(subsets) / count
    return total


@pytest.mark.parametrize("form", ["bernoulli", "count"])
@pytest.mark.parametrize("name", NAMES)
def test_weighted_loss_is_unbiased(name: str, form: str) -> None:
    size, rows = 5, 200_000
    cost = torch.tensor([0.7, 1.9, 0.2, 3.1, 1.0], dtype=torch.float64)
    objective = Masked(VOCAB, schedule=name, masking=form, eps=0.0)
    answer = torch.ones(rows, size, dtype=torch.bool)
    noised = objective.corrupt(torch.zeros(rows, size).long(), answer, torch.arange(rows) + 7)
    # a token costs more the more is hidden, as it does under a model
    hidden = 1 + 0.3 * noised.masked.sum(1, keepdim=True)
    losses = (noised.weights * noised.masked * cost * hidden).sum(1)
    error = losses.std() / rows**0.5
    assert abs(losses.mean() - exact_bound(cost)) < 4 * error
    assert error < 0.01 * exact_bound(cost)


@given(cases(), st.integers(1, 9), st.sampled_from(["batch", "sample", "masked", "row"]), masking)
@few
def test_chunked_loss_of_a_frozen_head_is_cross_entropy(
    case: Case, chunk: int, normalization: str, form: str
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, VOCAB.size, bias=False, dtype=torch.float64).requires_grad_(False)
    objective = Masked(VOCAB, normalization=normalization, masking=form, chunk_size=chunk)
    noised = objective.corrupt(*case)
    hidden = torch.randn(*case.tokens.shape, 6, dtype=torch.float64, requires_grad=True)
    total, weight = objective.loss(hidden, head, case.tokens, noised)
    (mine,) = torch.autograd.grad(3.0 * total, hidden)
    other = hidden.detach().clone().requires_grad_()
    plain, divisor = reference(other @ head.weight.T, case, noised, normalization)
    (theirs,) = torch.autograd.grad(3.0 * plain, other)
    # shares of a row are float32
    assert torch.allclose(total, plain, atol=1e-9, rtol=1e-6)
    assert torch.allclose(mine, theirs, atol=1e-9, rtol=1e-6)
    assert weight == divisor
    assert not bool(mine[~noised.masked].any())


def reference(
    logits: torch.Tensor, case: Case, noised: Noised, normalization: str
) -> tuple[torch.Tensor, int]:
    """The four normalisations written row by row over the whole vocabulary."""
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), case.tokens, reduction="none")
    total, divisor = logits.sum() * 0.0, 0
    for b in range(len(nll)):
        chosen, size = noised.masked[b], int(case.answer[b].sum())
        row = (nll[b] * noised.weights[b])[chosen].sum()
        if normalization == "sample" and size:
            total, divisor = total + row / size, divisor + 1
        if normalization == "batch":
            total, divisor = total + row, divisor + size
        if normalization == "masked":
            total, divisor = total + nll[b][chosen].sum(), divisor + int(chosen.sum())
        if normalization == "row" and bool(chosen.any()):
            total, divisor = total + nll[b][chosen].mean(), divisor + 1
    return total, divisor


@given(cases(), st.sampled_from([0.1, 0.5]), masking)
@few
def test_padding_weighs_the_end_of_sequence_less_and_nothing_else(
    case: Case, padding: float, form: str
) -> None:
    plain = Masked(VOCAB, masking=form).corrupt(*case)
    light = Masked(VOCAB, masking=form, eos_weight=padding).corrupt(*case)
    factor = torch.where(case.tokens == VOCAB.eos, padding, 1.0)
    assert torch.equal(light.masked, plain.masked)
    torch.testing.assert_close(light.weights, plain.weights * factor)
