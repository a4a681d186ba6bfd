"""Experts as one function: sorted groups, and all experts for few tokens."""

import pytest
import torch
from torch.nn import functional as F

from diffa.backbones import experts


def inputs(tokens=11, width=8, inner=6, count=5, chosen=2):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight, index = draw(tokens, count).softmax(-1).topk(chosen)
    weights = draw(count, inner, width), draw(count, inner, width), draw(count, width, inner)
    return draw(tokens, width), index, weight, *weights


def one_by_one(x, index, weight, gate, up, down):
    rows = []
    for token, own, share in zip(x, index, weight, strict=True):
        outs = [down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token)) for e in own.tolist()]
        rows.append(sum(s * out for s, out in zip(share, outs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("mix", [experts.mix_experts, experts._mix_all])
def test_experts_in_groups_compute_what_each_computes_alone(mix):
    parts = inputs()
    assert torch.allclose(mix(*parts), one_by_one(*parts), atol=1e-5)


def test_experts_without_tokens_are_left_out():
    x, _, weight, *rest = inputs()
    index = torch.tensor([[1, 4]]).expand(len(x), -1)
    due = one_by_one(x, index, weight, *rest)
    assert torch.allclose(experts.mix_experts(x, index, weight, *rest), due, atol=1e-5)
    assert experts.mix_experts(x[:0], index[:0], weight[:0], *rest).shape == (0, 8)


@pytest.mark.parametrize("mix", [experts.mix_experts, experts._mix_all])
def test_all_inputs_get_gradients(mix):
    x, index, *others = inputs(tokens=3)
    floats = [value.double().requires_grad_() for value in (x, *others)]
    assert torch.autograd.gradcheck(lambda x, *rest: mix(x, index, *rest), floats)
