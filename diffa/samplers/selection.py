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
    """Take every score of at least ``least``, or else the best (Fast-dLLM, arXiv 2505.22618)."""
    best = scores.masked_fill(~masked, -torch.inf).amax(dim=1, keepdim=True)
    return (scores >= best.clamp(max=least)) & masked


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


def stable(
    scores: Tensor, masked: Tensor, moved: Tensor, least: float, most_moved: float
) -> Tensor:
    """Take scores of at least ``least`` whose prediction has ``moved`` (B, R) by less than
    ``most_moved``, or the best score where there is none (KLASS, arXiv 2511.05664)."""
    calm = (scores >= least) & (moved < most_moved) & masked
    best = scores.masked_fill(~masked, -torch.inf).argmax(dim=1, keepdim=True)
    alone = torch.zeros_like(calm).scatter(1, best, True) & masked
    return torch.where(calm.any(dim=1, keepdim=True), calm, alone)


def leap(
    scores: Tensor, masked: Tensor, places: Tensor, anchor: float, relaxed: float, reach: int = 4
) -> Tensor:
    """Take scores of at least ``anchor``, and of at least ``relaxed`` within ``reach`` places of
    one (LocalLeap, arXiv 2510.07081); the best one always."""
    anchors = (scores >= anchor) & masked
    near = (places[:, :, None] - places[:, None, :]).abs() <= reach
    close = (near & anchors[:, None, :]).any(dim=2)
    best = scores.masked_fill(~masked, -torch.inf).argmax(dim=1, keepdim=True)
    taken = anchors | ((scores >= relaxed) & close)
    return taken.scatter(1, best, True) & masked


def spread(scores: Tensor, masked: Tensor, places: Tensor, least: float, low: float) -> Tensor:
    """Take scores of at least ``least``, and the best of every contiguous run of masked places
    that reaches ``low``; the best one always (dInfer's hierarchical rule, arXiv 2510.08666).

    ``places`` (B, R) rise along a row wherever it is masked.
    """
    before = torch.cat([places[:, :1] - 2, places[:, :-1]], dim=1)
    known = torch.cat([masked[:, :1], masked[:, :-1]], dim=1)
    run = ((places != before + 1) | ~known).cumsum(dim=1)
    own = scores.masked_fill(~masked, -torch.inf)
    same = run[:, :, None] == run[:, None, :]
    rivals = own[:, None, :].masked_fill(~same, -torch.inf)
    first = rivals.argmax(dim=2) == torch.arange(scores.shape[1], device=scores.device)
    best = own.argmax(dim=1, keepdim=True)
    taken = (scores >= least) | (first & (scores >= low))
    return taken.scatter(1, best, True) & masked


def capped(scores: Tensor, masked: Tensor, least: float, most: Tensor) -> Tensor:
    """Take scores above ``least``, at most ``most`` (B,) of them, and the best one always."""
    return fixed(scores, masked, most) & (
        (scores > least) | fixed(scores, masked, torch.ones_like(most))
    )
