"""Acceptance rules as pure functions of scores (B, R) and of which slots are masked (B, R).

Each returns the accepted slots as a bool (B, R) within ``masked``, at least one for every row
that has masks, without a Python loop over rows or tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_top_k(scores: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
    """Accept the ``counts`` (B,) highest scores of each row (LLaDA, arXiv 2502.09992, alg. 5)."""
    _, order = _sort_descending(scores, masked)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return _unsort(order, ranks < counts.clamp(min=1)[:, None]) & masked


def select_threshold(scores: Tensor, masked: Tensor, threshold: float) -> Tensor:
    """Accept scores of at least ``threshold``, or else the best (Fast-dLLM, arXiv 2505.22618)."""
    scores = scores.nan_to_num(nan=-torch.inf)  # whatever is compared with NaN is false
    best = scores.masked_fill(~masked, -torch.inf).amax(dim=1, keepdim=True)
    return (scores >= best.clamp(max=threshold)) & masked


def select_planned(
    scores: Tensor, masked: Tensor, counts: Tensor, threshold: float | None
) -> Tensor:
    """Accept scores above ``threshold`` if there are at least ``counts`` (B,) of them, or else the
    ``counts`` highest (SDAR's dynamic and LLaDA2.0's rule; without a threshold SDAR's static one).
    """
    best = select_top_k(scores, masked, counts)
    if threshold is None:
        return best
    high = (scores > threshold) & masked
    return torch.where((high.sum(dim=1) >= counts)[:, None], high, best)


def select_factor(
    scores: Tensor, masked: Tensor, factor: float, *, released: bool = False
) -> Tensor:
    """Accept the largest n with (n + 1)(1 - c_n) < factor, c sorted descending, at least one.

    This is the rule of Fast-dLLM's paper. Its released loop, which DIFFA-2 copies, tests
    c_n >= 1 - factor / (n + 1) and cannot tell "the last-ranked token fails" from "all pass": it
    accepts all tokens in both cases. ``released`` reproduces that.
    """
    ordered, order = _sort_descending(scores, masked)
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    if released:
        passes = ordered >= 1 - factor / (ranks + 1)
    else:
        passes = (ranks + 1) * (1 - ordered) < factor
    passes[:, :1] = True
    accepted = passes.cumprod(dim=1).bool()
    if released:
        only_last_fails = accepted.sum(dim=1) == masked.sum(dim=1) - 1
        accepted |= only_last_fails[:, None]
    return _unsort(order, accepted) & masked


def select_entropy_bound(entropies: Tensor, masked: Tensor, bound: float) -> Tensor:
    """Accept the lowest entropies while the sum of those before is at most ``bound`` (EB sampler,
    arXiv 2505.24857)."""
    ordered, order = _sort_descending(-entropies, masked)
    costs = torch.where(torch.isfinite(ordered), -ordered, torch.inf)
    before = torch.cat([torch.zeros_like(costs[:, :1]), costs.cumsum(dim=1)[:, :-1]], dim=1)
    return _unsort(order, before <= bound) & masked


def select_klass(
    scores: Tensor, masked: Tensor, divergence: Tensor, threshold: float, kl_threshold: float
) -> Tensor:
    """Accept scores of at least ``threshold`` and low KL divergence, or the best score.

    ``divergence`` (B, R) of the last steps must be below ``kl_threshold`` (KLASS, arXiv
    2511.05664).
    """
    stable = (scores >= threshold) & (divergence < kl_threshold) & masked
    return torch.where(stable.any(dim=1, keepdim=True), stable, _best(scores, masked))


def select_local_leap(
    scores: Tensor,
    masked: Tensor,
    places: Tensor,
    threshold: float,
    neighbor_threshold: float,
    reach: int = 4,
) -> Tensor:
    """Accept scores of at least ``threshold`` (anchors), those of at least ``neighbor_threshold``
    within ``reach`` places of an anchor, and the best score (LocalLeap, arXiv 2510.07081)."""
    anchors = (scores >= threshold) & masked
    near = (places[:, :, None] - places[:, None, :]).abs() <= reach  # (B, R, R)
    neighbors = (near & anchors[:, None, :]).any(dim=2) & (scores >= neighbor_threshold)
    return (anchors | neighbors | _best(scores, masked)) & masked


def select_runs(
    scores: Tensor, masked: Tensor, places: Tensor, threshold: float, run_threshold: float
) -> Tensor:
    """Accept scores of at least ``threshold``, and the best score of each run.

    A run is adjacent masks; its best score must be at least ``run_threshold``. The best score
    is always accepted (dInfer's hierarchical rule, arXiv 2510.08666). ``places`` (B, R)
    increase along a row wherever it is masked.
    """
    # A run ends where a place is skipped or not masked: places 4 5 6 9 10 are runs 1 1 1 2 2.
    before = torch.cat([places[:, :1], places[:, :-1]], dim=1)
    masked_before = torch.cat([masked[:, :1], masked[:, :-1]], dim=1)
    run = ((places != before + 1) | ~masked_before).cumsum(dim=1)
    own = scores.masked_fill(~masked, -torch.inf)
    same_run = run[:, :, None] == run[:, None, :]
    rivals = own[:, None, :].masked_fill(~same_run, -torch.inf)  # (B, R, R)
    best_of_run = rivals.argmax(dim=2) == torch.arange(scores.shape[1], device=scores.device)
    accepted = (scores >= threshold) | (best_of_run & (scores >= run_threshold))
    return (accepted | _best(scores, masked)) & masked


def select_capped(scores: Tensor, masked: Tensor, threshold: float, most: Tensor) -> Tensor:
    """Accept scores above ``threshold``, at most ``most`` (B,) per row, and the best score."""
    return select_top_k(scores, masked, most) & ((scores > threshold) | _best(scores, masked))


def _best(scores: Tensor, masked: Tensor) -> Tensor:
    """Mark each row's highest score, the leftmost of equal ones."""
    best = scores.masked_fill(~masked, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(masked).scatter(1, best, True) & masked


def _sort_descending(scores: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Sort masked slots by descending score, ties from the left; other slots come last."""
    return scores.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True, stable=True)


def _unsort(order: Tensor, accepted: Tensor) -> Tensor:
    """Undo a sort: mark the slots that ``accepted`` marks in sorted order."""
    return torch.empty_like(accepted).scatter(1, order, accepted)
