"""The linear map for few rows: the same product, and only where it pays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffa.objectives.likelihood import frozen_head_matrix
from diffa.runtime import cpu_linear as linear
from diffa.runtime.cpu_linear import Linear


@pytest.fixture
def products(monkeypatch):
    """Whether each call went by the weight's side."""
    seen = []
    plain = torch.mm
    monkeypatch.setattr(linear.torch, "mm", lambda *given: seen.append(True) or plain(*given))
    return seen


def large(bias=False):
    return Linear(1024, 1024, bias=bias)


@given(rows=st.integers(0, 70), batch=st.integers(1, 3), bias=st.booleans())
def test_it_is_the_product(rows, batch, bias):
    ours = large(bias)
    x = torch.randn(batch, rows, 1024)
    with torch.inference_mode():
        found, wanted = ours(x), torch.nn.functional.linear(x, ours.weight, ours.bias)
    assert found.shape == wanted.shape and found.is_contiguous()
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("rows, aside", [(7, False), (8, True), (64, True), (65, False)])
def test_few_rows_go_by_the_weight(products, rows, aside):
    with torch.inference_mode():
        large()(torch.randn(rows, 1024))
    assert bool(products) is aside


def test_small_weights_gradients_and_other_types_go_torchs_way(products):
    x = torch.randn(16, 1024)
    with torch.inference_mode():
        Linear(1024, 512)(x)
        large().double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert large()(x).dtype == torch.bfloat16
    part = large()
    part(x).sum().backward()
    assert part.weight.grad is not None and not products


def test_the_loss_knows_it_for_a_plain_matrix():
    head = large().requires_grad_(False)
    assert frozen_head_matrix(head) is head.weight
