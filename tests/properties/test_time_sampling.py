"""Levels, masks and weights of the masked objective's options, against enumeration and by law."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from diffa.errors import SpecError
from diffa.objectives.cart import cart_weights
from diffa.objectives.ctc import head_ctc_loss
from diffa.objectives.likelihood import token_entropy, token_logsumexp
from diffa.objectives.masked import Masked
from diffa.objectives.masking import answer_blocks
from diffa.objectives.time_sampling import sample_times
from diffa.testing import ObjectiveSuite
from diffa.types import Embeds, Noised, Vocab

VOCAB = Vocab(size=11, eos=8, pad=8, mask=10)
few = settings(
    max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
KINDS = ["independent", "antithetic", "low_discrepancy"]


class TestAntithetic(ObjectiveSuite):
    name, options, unbiased = "masked", {"time_sampling": "antithetic"}, True


class TestSpread(ObjectiveSuite):
    name, options, unbiased = (
        "masked",
        {"time_sampling": "low_discrepancy", "masking": "count"},
        True,
    )


class TestComplementary(ObjectiveSuite):
    """Each of the two copies alone has the bound as its expectation."""

    name, unbiased = "masked", True
    options = {"masking": "count", "complementary_masking": True}


class TestBlocks(ObjectiveSuite):
    """Unbiased for the bound of blocks (tests/test_learning.py), which is another."""

    name, options = "masked", {"masking": "count", "block_length": 2}


class TestCart(ObjectiveSuite):
    name, options = "masked", {"cart_p": 0.3}


class TestCertainty(ObjectiveSuite):
    name, options, plain = "masked", {"certainty_weight": 20.0}, False


# levels


@given(st.integers(0, 2**62), st.sampled_from([8, 31, 64]))
@few
def test_spread_times_of_any_run_of_seeds_are_even(first: int, count: int) -> None:
    """Every arc of the circle of length w holds n w times to within the golden ratio's bound."""
    t = (
        sample_times("low_discrepancy", torch.arange(count)[:, None] + first)[:, 0]
        .double()
        .sort()
        .values
    )
    gaps = torch.diff(t, append=t[:1] + 1)
    assert float(gaps.max()) * count < 2.7 and float(gaps.min()) * count > 0.35


@given(st.integers(0, 2**61))
@few
def test_antithetic_times_of_a_pair_add_up_to_one(half: int) -> None:
    t = sample_times("antithetic", torch.tensor([[2 * half], [2 * half + 1]]))
    assert float(t.sum()) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_uniform_and_inside_whatever_the_seeds(kind: str) -> None:
    hashed = torch.randint(0, 2**62, (20_000, 1), generator=torch.Generator().manual_seed(1))
    for seeds in (torch.arange(20_000)[:, None], hashed):
        t = sample_times(kind, seeds)
        assert float(t.min()) > 0 and float(t.max()) < 1
        share = torch.histc(t, 20, 0, 1) / len(t)
        assert float((share - 0.05).abs().max()) < 5 * (0.05 / len(t)) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_row_have_times_of_their_own(kind: str) -> None:
    seeds, block = torch.arange(4000)[:, None], torch.arange(3).expand(4000, -1)
    t = sample_times(kind, seeds, block)
    for column in range(3):
        share = torch.histc(t[:, column], 10, 0, 1) / 4000
        assert float((share - 0.1).abs().max()) < 5 * (0.1 / 4000) ** 0.5
    apart = (t[:, :1] - t[:, 1:]).abs()
    assert float(apart.min()) < 0.9 and bool((apart > 1e-6).any())


def test_spread_and_pairs_lower_the_variance_of_a_step() -> None:
    """Sixteen rows with consecutive seeds; the loss falls with the level, as a model's does."""
    objective = {kind: Masked(VOCAB, masking="count", time_sampling=kind) for kind in KINDS}
    found = {}
    for kind, made in objective.items():
        noised = corrupt(made, 6, 16 * 2000)
        losses = (noised.weights * (1 + noised.masked.sum(1, keepdim=True))).sum(1)
        found[kind] = float(losses.view(2000, 16).mean(1).var())
    assert found["antithetic"] < 0.8 * found["independent"]
    assert found["low_discrepancy"] < 0.3 * found["independent"]


# expectations


def corrupt(objective: Masked, size: int, rows: int, first: int = 7) -> Noised:
    answer = torch.ones(rows, size, dtype=torch.bool)
    return objective.corrupt(torch.zeros(rows, size).long(), answer, torch.arange(rows) + first)


def bound(cost: torch.Tensor, width: int) -> float:
    """Blocks of ``width``: the sum over sizes l of the mean cost of all sets of l, over l."""
    total = 0.0
    for first in range(0, len(cost), width):
        own = cost[first : first + width]
        for count in range(1, len(own) + 1):
            sets = list(itertools.combinations(range(len(own)), count))
            sums = [float(own[list(s)].sum() * (1 + 0.3 * count)) for s in sets]
            total += sum(sums) / len(sets) / count
    return total


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "geometric"])
@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"time_sampling": "antithetic"}, 5),
        ({"time_sampling": "low_discrepancy"}, 5),
        ({"time_sampling": "low_discrepancy", "masking": "count"}, 5),
        ({"masking": "count", "complementary_masking": True}, 5),
        (
            {
                "masking": "count",
                "complementary_masking": True,
                "block_length": 3,
                "time_sampling": "low_discrepancy",
            },
            3,
        ),
        ({"block_length": 2}, 2),
        ({"block_length": 2, "masking": "count", "time_sampling": "antithetic"}, 2),
    ],
    ids=str,
)
def test_the_expectation_is_the_bound(options: dict[str, Any], width: int, schedule: str) -> None:
    cost = torch.tensor([0.7, 1.9, 0.2, 3.1, 1.0], dtype=torch.float64)
    objective = Masked(VOCAB, eps=0.0, schedule=schedule, **options)
    rows = 20_000
    noised = corrupt(objective, 5, rows)
    views = [noised]
    if objective.complementary_masking:
        seeds = torch.arange(rows) + 7
        views.append(objective.second(torch.zeros(rows, 5).long(), noised, seeds))
    block = torch.arange(5) // width
    for view in views:
        # a token costs more the more of its block is hidden
        hidden = F.one_hot(block).double()
        beside = (view.masked.double() @ hidden) @ hidden.T
        losses = (view.weights * cost * (1 + 0.3 * beside)).sum(1)
        error = float(losses.std()) / rows**0.5
        assert abs(float(losses.mean()) - bound(cost, width)) < 4.5 * error


# masks


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 2**40))
@few
def test_counted_blocks_have_the_size_their_weight_says(size: int, width: int, seed: int) -> None:
    objective = Masked(VOCAB, masking="count", block_length=width)
    noised = corrupt(objective, size, 4, seed)
    for first in range(0, size, width):
        own = slice(first, first + width)
        counts = noised.masked[:, own].sum(1)
        assert bool((counts >= 1).all())
        length = min(width, size - first)
        assert torch.allclose(noised.weights[:, own].sum(1), torch.full((4,), float(length)))


def test_answers_that_do_not_begin_at_the_first_column_are_cut_alike() -> None:
    answer = torch.tensor([[False, True, False, True, True, True, False, True]])
    found = answer_blocks(answer, 2)
    assert found.number[answer].tolist() == [0, 0, 1, 1, 2]
    assert found.size[answer].tolist() == [2, 2, 2, 2, 1]
    assert found.first[answer].tolist() == [0, 0, 2, 2, 4]


def test_full_rows_count_once_whether_or_not_there_is_a_second_copy() -> None:
    tokens, answer, seeds = torch.zeros(5, 4).long(), torch.ones(5, 4).bool(), torch.arange(5)
    objective = Masked(VOCAB, masking="count", complementary_masking=True, full_mask_prob=1.0)
    first = objective.corrupt(tokens, answer, seeds)
    second = objective.second(tokens, first, seeds)
    assert bool(first.masked.all()) and not bool(second.masked.any())
    assert float((first.weights + second.weights).mean()) / 2 == 1.0


# weights


@given(st.integers(1, 9), st.sampled_from([0.1, 0.3, 0.8]), st.integers(0, 2**31))
@few
def test_cart_is_its_definition(size: int, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    answer = torch.rand(2, size + 3, generator=g) < 0.7
    masked = answer & (torch.rand(2, size + 3, generator=g) < 0.6)
    found = cart_weights(masked, answer, share)
    for row in range(2):
        order = answer[row].nonzero()[:, 0].tolist()
        for n, column in enumerate(order):
            seen = [i for i, other in enumerate(order) if not masked[row, other] and i != n]
            due = sum(share * (1 - share) ** (abs(n - i) - 1) for i in seen)
            # a prompt of a thousand tokens before the answer, all visible
            due += sum(share * (1 - share) ** (n + i) for i in range(1000))
            if masked[row, column]:
                assert abs(float(found[row, column]) - due / 2) < 1e-5


# certainty


def test_certainty_adds_the_entropy_of_tokens_that_are_right() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, VOCAB.size, bias=False).requires_grad_(False)
    tokens = torch.randint(0, 8, (6, 9))
    hidden = torch.randn(6, 9, 6)
    hidden[:, :5] = 3 * head.weight[tokens[:, :5]]  # most of these are restored right
    plain, sure = (
        Masked(VOCAB),
        Masked(VOCAB, certainty_weight=2.0, certainty_temperature=0.5, chunk_size=4),
    )
    noised = plain.corrupt(tokens, torch.ones_like(tokens).bool(), torch.arange(6))
    logits = head(hidden)
    right = noised.masked & (logits.argmax(-1) == tokens)
    assert 0 < int(right.sum()) < int(noised.masked.sum())
    shares = (logits / 0.5).softmax(-1)
    entropy = -(shares * shares.log()).sum(-1)[right].sum()
    found = sure.loss(hidden, head, tokens, noised)[0] - plain.loss(hidden, head, tokens, noised)[0]
    assert torch.allclose(found, 2 * entropy, rtol=1e-4)


def test_entropy_and_normaliser_have_the_gradient_of_the_whole_vocabulary() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(7, 6, requires_grad=True)
    shares = (head(hidden) / 0.7).softmax(-1)
    for found, due in (
        (token_entropy(hidden, head, 0.7, 3), -(shares * shares.log()).sum(-1)),
        (token_logsumexp(hidden, head, 3), head(hidden).logsumexp(-1)),
    ):
        assert torch.allclose(found, due, atol=1e-5)
        (mine,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
        (theirs,) = torch.autograd.grad(due.sum(), hidden, retain_graph=True)
        assert torch.allclose(mine, theirs, atol=1e-5)


# CTC


def spoken() -> tuple[Embeds, list[torch.Tensor], nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(6, 30, bias=False).requires_grad_(False)
    values = torch.randn(2, 9, 6, requires_grad=True)
    words = [torch.tensor([3, 3, 7]), torch.tensor([12])]
    return Embeds(values, torch.tensor([9, 5])), words, head


def test_exact_ctc_is_ctc_over_the_whole_vocabulary() -> None:
    embeds, words, head = spoken()
    found = head_ctc_loss(embeds, head, words, blank=29, exact=True, chunk_size=4)
    logs = head(embeds.values).log_softmax(2).transpose(0, 1)
    due = F.ctc_loss(
        logs, torch.cat(words), embeds.lengths, torch.tensor([3, 1]), blank=29, reduction="sum"
    )
    assert torch.allclose(found, due / 4, atol=1e-5)
    (mine,) = torch.autograd.grad(found, embeds.values, retain_graph=True)
    (theirs,) = torch.autograd.grad(due / 4, embeds.values)
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert not bool(mine[1, 5:].any())  # past the row's end


def test_ctc_among_the_batchs_words_costs_no_vocabulary() -> None:
    """The head's rows for the words and the blank are all that is multiplied."""
    embeds, words, head = spoken()
    found = head_ctc_loss(embeds, head, words, blank=29)
    ids = torch.tensor([29, 3, 7, 12])
    logs = (embeds.values @ head.weight[ids].T).log_softmax(2).transpose(0, 1)
    targets = torch.tensor([1, 1, 2, 3])
    due = F.ctc_loss(logs, targets, embeds.lengths, torch.tensor([3, 1]), reduction="sum")
    assert torch.allclose(found, due / 4, atol=1e-5)
    assert found < head_ctc_loss(embeds, head, words, blank=29, exact=True)
    learning = nn.Linear(6, 30, bias=False)
    learning.load_state_dict(head.state_dict())
    assert torch.allclose(head_ctc_loss(embeds, learning, words, blank=29), found, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"complementary_masking": True}, "masking: count"),
        ({"block_length": 0}, "block_length must be at least 1"),
        ({"cart_p": 1.0}, "cart_p must lie in"),
        ({"certainty_weight": -1.0}, "certainty_weight must"),
        ({"certainty_temperature": 0.0}, "certainty_weight must"),
    ],
)
def test_options_that_make_no_sense_say_so(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Masked(VOCAB, **options)
