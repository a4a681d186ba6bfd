"""Credit for tokens that kept being the likeliest (CreditDecoding, arXiv 2510.06133)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffa.samplers.blocks import Place


class Credit:
    """Raises logits by strength * log(1 + E): E decays, and grows where a token ranks first.

    Only the ``room`` strongest tokens of a slot are remembered, not the whole vocabulary.
    """

    def __init__(
        self,
        count: int,
        length: int,
        device: torch.device,
        *,
        strength: float,
        decay: float = 0.8,
        power: float = 0.2,
        room: int = 4,
    ) -> None:
        self._strength, self._decay, self._power = strength, decay, power
        self._dump = length  # the last column takes what padding would write
        self._ids = torch.zeros(count, length + 1, room, dtype=torch.long, device=device)
        self._energy = torch.zeros(count, length + 1, room, device=device)

    def raise_(self, logits: Tensor, place: Place) -> Tensor:
        """Credit the leaders of clean logits (B, R, V), then raise all tokens with credit."""
        at = torch.where(place.masked, place.places, self._dump)
        row = torch.arange(len(at), device=at.device)[:, None]
        best, leader = logits.max(dim=-1, keepdim=True)
        share = (best - logits.logsumexp(dim=-1, keepdim=True)).exp() ** self._power
        ids, energy = self._ids[row, at], self._energy[row, at] * self._decay
        known = (ids == leader) & (energy > 0)
        weakest = energy.argmin(dim=-1, keepdim=True)
        slot = torch.where(known.any(dim=-1, keepdim=True), known.int().argmax(-1, True), weakest)
        kept = torch.where(known.any(dim=-1, keepdim=True), energy.gather(-1, slot), 0.0)
        energy = energy.scatter(-1, slot, kept + share.to(energy.dtype))
        ids = ids.scatter(-1, slot, leader)
        self._ids[row, at], self._energy[row, at] = ids, energy
        more = self._strength * energy.log1p()
        return logits.scatter_add(-1, ids, torch.where(energy > 0, more, 0.0).to(logits.dtype))
