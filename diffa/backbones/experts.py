"""Mixture-of-experts feed-forward with a fixed number of kernels, however many experts there are.

Shapes: T tokens, W hidden size, E experts, K experts of a token, I width of an expert::

    tokens (T, W) --sort by expert--> (T * K, W) --one matmul per group--> (T * K, W) --> (T, W)
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.backbones.transformer import swiglu

# So few tokens cost less time than reading the weights, even where all experts process them.
_FEW_TOKENS = 128


def mix_experts(
    x: Tensor, index: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Return the weighted sum (T, W) of the outputs of every token's experts; a GPU never waits.

    Args:
        x: Tokens, (T, W).
        index: Experts of each token, (T, K).
        weight: Their weights, (T, K).
        gate: First projections of the gated feed-forward networks, (E, I, W).
        up: Second projections, (E, I, W).
        down: Third projections, (E, W, I).
    """
    if x.is_cuda and not _suits_grouped_matmul(x, gate, down):
        return _mix_all(x, index, weight, gate, up, down)
    experts, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(len(gate), device=x.device), right=True)
    sorted_x = x[order // index.shape[1]]
    inner = swiglu(grouped_linear(sorted_x, gate, ends), grouped_linear(sorted_x, up, ends))
    outputs = grouped_linear(inner, down, ends)
    outputs = torch.empty_like(outputs).index_copy(0, order, outputs)
    outputs = outputs.view(*index.shape, x.shape[1])
    return (outputs * weight[..., None].to(outputs.dtype)).sum(dim=1).to(x.dtype)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Map the rows of x (N, in) by the weight (E, out, in) of their group; groups end at ``ends``.

    One matmul for all groups on a GPU; on a CPU one for each that has rows.
    """
    if x.is_cuda:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            x, weight = x.to(dtype), weight.to(dtype)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends.int())
    bounds = itertools.pairwise([0, *ends.tolist()])
    parts = [F.linear(x[a:b], own) for (a, b), own in zip(bounds, weight, strict=True) if a < b]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])


def _mix_all(
    x: Tensor, index: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Compute what ``mix_experts`` does, with every expert for every token."""
    share = weight.new_zeros(len(x), len(gate)).scatter(1, index, weight)
    inner = swiglu(F.linear(x, gate.flatten(0, 1)), F.linear(x, up.flatten(0, 1)))
    inner = inner.view(len(x), *gate.shape[:2]) * share[..., None].to(inner.dtype)
    return torch.bmm(inner.transpose(0, 1), down.transpose(1, 2)).sum(dim=0).to(x.dtype)


def _suits_grouped_matmul(x: Tensor, gate: Tensor, down: Tensor) -> bool:
    """Return whether torch's grouped matmul takes these tensors, and is the faster way."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    aligned = all(width * dtype.itemsize % 16 == 0 for width in (gate.shape[2], down.shape[2]))
    if not aligned or dtype == torch.float64:
        return False
    # Elsewhere torch takes the groups one after another and waits for their sizes.
    fast = dtype == torch.bfloat16 and torch.cuda.is_available()
    fast = fast and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return fast or len(x) > _FEW_TOKENS
