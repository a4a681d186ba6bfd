"""Credit for tokens that keep ranking first (CreditDecoding, arXiv 2510.06133)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffa.samplers.blocks import BlockState

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Credit:
    """Raise logits by ``strength`` * log(1 + E) for a credit E per slot and token.

    At every pass E decays by ``decay``, and the slot's first token gains p ** ``power`` for its
    probability p. Only the ``tokens_per_slot`` highest credits of a slot are kept.
    """

    def __init__(
        self,
        canvas: Canvas,
        *,
        strength: float,
        decay: float = 0.8,
        power: float = 0.2,
        tokens_per_slot: int = 4,
    ) -> None:
        self._strength, self._decay, self._power = strength, decay, power
        shape = (canvas.count, canvas.length + 1, tokens_per_slot)  # see BlockState.memory_index
        self._ids = torch.zeros(shape, dtype=torch.long, device=canvas.tokens.device)
        self._credit = torch.zeros(shape, device=canvas.tokens.device)

    def boost(self, logits: Tensor, state: BlockState) -> Tensor:
        """Credit the first token of each slot, and return the raised logits (B, R, V)."""
        index = state.memory_index
        best, first = logits.max(dim=-1, keepdim=True)
        gain = (best - logits.logsumexp(dim=-1, keepdim=True)).exp() ** self._power
        ids, credit = self._ids[index], self._credit[index] * self._decay
        match = (ids == first) & (credit > 0)
        known = match.any(dim=-1, keepdim=True)
        # A token without credit takes the place of the lowest one.
        lowest = credit.argmin(dim=-1, keepdim=True)
        place = torch.where(known, match.int().argmax(-1, True), lowest)
        old = torch.where(known, credit.gather(-1, place), 0.0)
        credit = credit.scatter(-1, place, old + gain.to(credit.dtype))
        ids = ids.scatter(-1, place, first)
        self._ids[index], self._credit[index] = ids, credit
        bonus = torch.where(credit > 0, self._strength * credit.log1p(), 0.0)
        return logits.scatter_add(-1, ids, bonus.to(logits.dtype))
