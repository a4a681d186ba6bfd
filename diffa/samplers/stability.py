"""How far the prediction of each slot has moved recently (KLASS, arXiv 2511.05664)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffa.samplers.blocks import BlockState
from diffa.samplers.predictions import Predictions

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Stability:
    """Keep the ``top`` most likely tokens of every answer slot, instead of whole distributions.

    The divergence from the pass before is that of both distributions reduced to those tokens and
    "any other token": a lower bound, exact for vocabularies of at most ``top`` tokens.
    """

    def __init__(self, canvas: Canvas, *, top: int = 64, passes: int = 2) -> None:
        self._top = top
        self._ids: Tensor | None = None
        self._log_probs = torch.empty(0)
        shape = (canvas.count, canvas.length + 1, passes)  # + 1: see BlockState.memory_index
        self._recent = torch.full(shape, torch.inf, device=canvas.tokens.device)

    def update(self, predictions: Predictions, state: BlockState) -> Tensor:
        """Return the largest KL(now || before) in nats of the last passes, (B, R).

        It is infinite until a slot has been predicted once more than ``passes``.
        """
        index = state.memory_index
        log_probs = predictions.logits - predictions.log_total[..., None]
        top = min(self._top, log_probs.shape[-1])
        if self._ids is None:
            shape = (*self._recent.shape[:2], top)
            self._ids = state.places.new_zeros(shape)
            self._log_probs = log_probs.new_full(shape, torch.nan)
        moved = coarse_kl_divergence(log_probs.gather(-1, self._ids[index]), self._log_probs[index])
        moved = moved.nan_to_num(nan=torch.inf).float()  # NaN: the slot's first prediction
        recent = torch.cat([self._recent[index][..., 1:], moved[..., None]], dim=-1)
        self._recent[index] = recent
        likeliest = log_probs.topk(top, dim=-1)
        self._ids[index], self._log_probs[index] = likeliest.indices, likeliest.values
        return recent.amax(dim=-1)


def coarse_kl_divergence(now: Tensor, before: Tensor) -> Tensor:
    """Return KL(now || before) in nats of log-probabilities (..., K) and one class for the rest."""
    tiny = torch.finfo(now.dtype).eps
    rest_now = (1 - now.exp().sum(dim=-1)).clamp(min=tiny)
    rest_before = (1 - before.exp().sum(dim=-1)).clamp(min=tiny)
    known = (now.exp() * (now - before).clamp(-1e4, 1e4)).sum(dim=-1)
    return (known + rest_now * (rest_now / rest_before).log()).clamp(min=0)
