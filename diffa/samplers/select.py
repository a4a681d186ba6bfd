"""Which masked tokens to accept now: pure functions of scores (B, R) and what is masked (B, R).

Each returns a bool (B, R) within ``masked``, with at least one token for every row that has any,
and without a Python loop over rows or tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fixed(scores: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
    """Take each row's ``counts`` (B,) highest scores (LLaDA, arXiv 2502.09992, algorithm 5)."""
    _, order = _descending(scores, masked)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return _back(order, ranks < counts.clamp(min=1)[:, None]) & masked


def threshold(scores: Tensor, masked: Tensor, least: float) -> Tensor:
    """Take every score of at least ``least``, and the best one (Fast-dLLM, arXiv 2505.22618)."""
    best = scores.masked_fill(~masked, -torch.inf).argmax(dim=1, keepdim=True)
    return (scores >= least).scatter(1, best, True) & masked


def factor(scores: Tensor, masked: Tensor, scale: float) -> Tensor:
    """Take the largest n with (n + 1)(1 - c_n) < scale, c sorted, or one (Fast-dLLM).

    The rule as stated in the papers: the released loops also accept a failing last token.
    """
    ordered, order = _descending(scores, masked)
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    passes = (ranks + 1) * (1 - ordered) < scale
    passes[:, :1] = True
    return _back(order, passes.cumprod(dim=1).bool()) & masked


def entropy_bound(entropies: Tensor, masked: Tensor, bound: float) -> Tensor:
    """Take the lowest entropies while the sum of those before stays within ``bound`` (EB,
    arXiv 2505.24857)."""
    ordered, order = _descending(-entropies, masked)
    costs = torch.where(torch.isfinite(ordered), -ordered, torch.inf)
    before = torch.cat([torch.zeros_like(costs[:, :1]), costs.cumsum(dim=1)[:, :-1]], dim=1)
    return _back(order, before <= bound) & masked


def _descending(scores: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Sort what is masked by falling score, ties to the left, the rest last."""
    return scores.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True, stable=True)


def _back(order: Tensor, taken: Tensor) -> Tensor:
    """Undo a sort: mark the places that ``taken`` marks in the sorted order."""
    return torch.zeros_like(taken).scatter(1, order, taken)
