"""Numbers for what an adapter says: the first word, the second, and so on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Numbering(nn.Module):
    """Adds to every embedding that says something a learned one for how many did so before.

    A large language model counts the words in a row of embeddings by itself. One of a million
    parameters does not, with a dozen empty embeddings between two words, and then copies eight
    digits at a third wrong. This is no part of DIFFA.

    Args:
        width: of the embeddings.
        most: numbers that are told apart; what comes after has the last one.
    """

    def __init__(self, width: int, most: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1)
        self.table = nn.Parameter(0.02 * torch.randn(most, width))

    def forward(self, values: Tensor, inside: Tensor) -> Tensor:
        """Number embeddings (B, N, W); those not ``inside`` (B, N) say nothing.

        Neighbours that both say something say one thing, as in CTC, and share its number.
        """
        share = self.gate(values)[..., 0].sigmoid() * inside
        says = share.detach() > 0.5
        begins = says.clone()
        begins[:, 1:] &= ~says[:, :-1]
        before = begins.cumsum(1) - says.long()
        numbers = self.table[before.clamp(0, len(self.table) - 1)]
        numbered: Tensor = values + share[..., None] * numbers
        return numbered
