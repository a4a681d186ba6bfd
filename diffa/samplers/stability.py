"""How far each slot's prediction has moved of late (KLASS, arXiv 2511.05664)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffa.samplers.blocks import Place
from diffa.samplers.predictions import Predictions


class Stability:
    """Remembers the likeliest ``top`` tokens of every answer slot, not whole distributions.

    The divergence from the step before is measured between the two distributions coarsened to
    those tokens and "any other": a lower bound, exact for vocabularies that fit.
    """

    def __init__(
        self, count: int, length: int, device: torch.device, *, top: int = 64, patience: int = 2
    ) -> None:
        self._top, self._dump = top, length  # the last column takes what padding would write
        self._ids: Tensor | None = None
        self._logs = torch.empty(0)
        self._recent = torch.full((count, length + 1, patience), torch.inf, device=device)

    def observe(self, predictions: Predictions, place: Place) -> Tensor:
        """Return the largest divergence KL(now || before) of the last steps, (B, R).

        It is infinite until a slot has been seen often enough.
        """
        at = torch.where(place.masked, place.places, self._dump)
        row = torch.arange(len(at), device=at.device)[:, None]
        logs = predictions.logits - predictions.total[..., None]
        top = min(self._top, logs.shape[-1])
        if self._ids is None:
            room = self._recent.shape[:2]
            self._ids = at.new_zeros(*room, top)
            self._logs = logs.new_full((*room, top), torch.nan)
        moved = divergence(logs.gather(-1, self._ids[row, at]), self._logs[row, at])
        moved = moved.nan_to_num(nan=torch.inf)  # nothing was known of this slot
        recent = torch.cat([self._recent[row, at][..., 1:], moved[..., None]], dim=-1)
        self._recent[row, at] = recent
        found = logs.topk(top, dim=-1)
        self._ids[row, at], self._logs[row, at] = found.indices, found.values
        return recent.amax(dim=-1)


def divergence(now: Tensor, before: Tensor) -> Tensor:
    """KL(now || before) in nats of log-probabilities (..., K), the rest taken as one more."""
    tiny = torch.finfo(now.dtype).eps
    rest_now = (1 - now.exp().sum(dim=-1)).clamp(min=tiny)
    rest_before = (1 - before.exp().sum(dim=-1)).clamp(min=tiny)
    known = (now.exp() * (now - before).clamp(-1e4, 1e4)).sum(dim=-1)
    return (known + rest_now * (rest_now / rest_before).log()).clamp(min=0)
