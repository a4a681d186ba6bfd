"""The objectives and the loss they share, against plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from diffa.errors import SpecError
from diffa.objectives.autoregressive import Autoregressive
from diffa.objectives.likelihood import frozen_head_matrix, token_nll
from diffa.objectives.masked import Masked
from diffa.types import Noised, Vocab

VOCAB = Vocab(size=13, eos=11, pad=11, mask=12)
CAUSAL = Vocab(size=13, eos=11, pad=11, mask=None)


class Owner:
    """A backbone's head as a method, with the matrix it multiplies by."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.head_weight = weight

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.head_weight.T


def heads() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    torch.manual_seed(1)
    linear = nn.Linear(5, 13, bias=False, dtype=torch.float64)
    biased = nn.Linear(5, 13, dtype=torch.float64)
    frozen = nn.Linear(5, 13, bias=False, dtype=torch.float64).requires_grad_(False)
    return {
        "frozen": frozen,
        "learning": linear,
        "biased": biased.requires_grad_(False),
        "method": Owner(frozen.weight).head,
        "function": lambda hidden: linear(hidden).tanh(),
    }


@pytest.mark.parametrize("name", list(heads()))
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_every_head_gives_cross_entropy_and_its_gradients(name: str, chunk: int | None) -> None:
    head = heads()[name]
    hidden = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 13, (10,))
    rows = token_nll(hidden, head, targets, chunk)
    logits = head(hidden)
    plain = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    assert torch.allclose(rows.nll.double(), plain.double(), atol=1e-5)
    assert torch.equal(rows.correct, logits.argmax(1) == targets)
    weights = torch.rand(10, dtype=torch.float64)
    (mine,) = torch.autograd.grad((rows.nll * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((plain * weights).sum(), hidden)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_learning_head_gets_its_gradient_and_a_frozen_one_none() -> None:
    made = heads()
    hidden, targets = torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 13, (4,))
    token_nll(hidden.requires_grad_(), made["learning"], targets, 2).nll.sum().backward()
    assert made["learning"].weight.grad.abs().sum() > 0
    token_nll(hidden, made["frozen"], targets, 2).nll.sum().backward()
    assert made["frozen"].weight.grad is None


def test_only_a_head_that_is_a_plain_frozen_product_is_read_directly() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    made = heads()
    assert frozen_head_matrix(made["frozen"]) is not None
    assert frozen_head_matrix(made["method"]) is not None
    scaled = Scaled(5, 13, bias=False).requires_grad_(False)
    assert all(frozen_head_matrix(made[n]) is None for n in ("learning", "biased", "function"))
    assert frozen_head_matrix(scaled) is None


def test_a_whole_vocabulary_is_never_held_at_once() -> None:
    head = nn.Linear(4, 500, bias=False).requires_grad_(False)
    hidden = torch.randn(64, 4, requires_grad=True)
    largest = 0

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Spy():
        token_nll(hidden, head, torch.randint(0, 500, (64,)), 8).nll.sum().backward()
    assert largest <= 8 * 500


def test_half_precision_heads_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 4000, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(20, 16), torch.randint(0, 4000, (20,))
    exact = token_nll(hidden, head, targets).nll
    half = token_nll(hidden.bfloat16(), head.bfloat16(), targets)
    assert half.nll.dtype == torch.float32
    assert torch.allclose(half.nll, exact, atol=0.05)


def test_no_masked_token_gives_zero_and_a_zero_gradient() -> None:
    objective = Masked(VOCAB)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    noised = objective.corrupt(tokens, torch.zeros(2, 3, dtype=torch.bool), torch.arange(2))
    hidden = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    for head in heads().values():
        total, weight = objective.loss(hidden, head, tokens, noised)
        (gradient,) = torch.autograd.grad(total, hidden)
        assert total == 0 and weight == 0 and not bool(gradient.any())


def test_full_masks_whole_answers_at_weight_one() -> None:
    answer = torch.ones(8, 6, dtype=torch.bool)
    noised = Masked(VOCAB, full_mask_prob=1.0).corrupt(
        torch.zeros(8, 6).long(), answer, torch.arange(8)
    )
    assert torch.equal(noised.masked, answer)
    assert bool((noised.weights == 1).all())


def test_counted_masks_have_the_size_their_weight_says() -> None:
    answer = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    noised = Masked(VOCAB, masking="count").corrupt(
        torch.zeros(50, 20).long(), answer, torch.arange(50)
    )
    sizes, counts = answer.sum(1), noised.masked.sum(1)
    assert torch.allclose(noised.weights.sum(1), sizes.float())
    assert bool((counts >= 1).all())


def test_autoregressive_predicts_each_answer_token_from_the_row_before() -> None:
    objective = Autoregressive(CAUSAL)
    tokens = torch.randint(0, 11, (2, 6))
    answer = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1]]).bool()
    noised = objective.corrupt(tokens, answer, torch.arange(2))
    assert torch.equal(noised.tokens, tokens)
    hidden = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    head = heads()["frozen"]
    measure = objective.measure(hidden, head, tokens, noised)
    logits = head(hidden)
    wanted = [(0, 2), (0, 3), (0, 4), (1, 1), (1, 5)]
    plain = sum(nn.functional.cross_entropy(logits[b, i - 1], tokens[b, i]) for b, i in wanted)
    assert torch.allclose(measure.sum, plain)
    assert measure.masked == 5 and measure.weight == 6
    (gradient,) = torch.autograd.grad(measure.sum, hidden)
    used = {(b, i - 1) for b, i in wanted}
    assert {(int(b), int(i)) for b, i in gradient.abs().sum(2).nonzero()} == used


def test_loss_is_the_first_half_of_the_measure() -> None:
    objective = Masked(VOCAB)
    tokens, answer = torch.randint(0, 11, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    noised = objective.corrupt(tokens, answer, torch.arange(3))
    hidden, head = torch.randn(3, 7, 5, dtype=torch.float64), heads()["frozen"]
    measure = objective.measure(hidden, head, tokens, noised)
    assert objective.loss(hidden, head, tokens, noised) == (measure.sum, measure.weight)
    assert 0 <= measure.correct <= measure.masked == noised.masked.sum()


def test_batch_normalisation_is_diffas() -> None:
    """Sum of CE / level over masked tokens, divided by the batch's answer tokens."""
    tokens = torch.randint(0, 11, (2, 8))
    answer = torch.arange(8)[None].ge(torch.tensor([[2], [5]]))
    level = torch.tensor([[0.4], [0.9]])
    masked = answer & (torch.rand(2, 8) < 0.7)
    noised = Noised(tokens.masked_fill(masked, 12), masked, masked / level, answer)
    hidden, head = torch.randn(2, 8, 5, dtype=torch.float64), heads()["frozen"]
    total, weight = Masked(VOCAB).loss(hidden, head, tokens, noised)
    nll = nn.functional.cross_entropy(head(hidden).transpose(1, 2), tokens, reduction="none")
    assert torch.allclose(total / weight, (nll * masked / level).sum() / answer.sum())


def test_row_normalisation_is_the_mean_of_the_rows_own_means() -> None:
    """However much a row weighs or hides; one that hides nothing has no mean."""
    tokens, answer = torch.randint(0, 11, (3, 6)), torch.ones(3, 6, dtype=torch.bool)
    masked = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    weights = masked * torch.tensor([3.0, 1.0, 1.0, 1.0, 7.0, 7.0])
    hidden, head = torch.randn(3, 6, 5, dtype=torch.float64), heads()["frozen"]
    rule = Masked(VOCAB, normalization="row")
    total, weight = rule.loss(hidden, head, tokens, Noised(tokens, masked, weights, answer))
    nll = nn.functional.cross_entropy(head(hidden).transpose(1, 2), tokens, reduction="none")
    first = (3 * nll[0, 0] + nll[0, 1:4].sum()) / 6
    assert torch.allclose(total / weight, (first + nll[1, 1]) / 2)


@pytest.mark.parametrize("made", [Masked(VOCAB, full_mask_prob=1.0, eos_weight=0.25),
                                  Autoregressive(CAUSAL, eos_weight=0.25)])  # fmt: skip
def test_padding_weighs_the_eos_tokens_of_answers(made: Masked | Autoregressive) -> None:
    tokens = torch.tensor([[11, 5, 11, 11]])  # the first is the prompt's, 11 is EOS
    answer = torch.tensor([[False, True, True, True]])
    noised = made.corrupt(tokens, answer, torch.tensor([3]))
    assert noised.weights.tolist() == [[0, 1, 0.25, 0.25]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eps": 2.0}, "eps"),
        ({"full_mask_prob": -0.1}, "full_mask_prob"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "polynomial", "power": 0.0}, "power"),
    ],
)
def test_bad_options_are_named(options: dict, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Masked(VOCAB, **options)


def test_masked_needs_a_mask_token() -> None:
    with pytest.raises(SpecError, match="mask"):
        Masked(CAUSAL)
