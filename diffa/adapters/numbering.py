"""Embeddings of word numbers that an adapter adds to its output: first word, second word, ..."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Numbering(nn.Module):
    """Add a learned embedding of its number to every embedding that is part of a word.

    A large language model counts the words in a row of embeddings by itself. One of a million
    parameters does not when a dozen empty embeddings lie between two words: it copies eight
    digits with a third of them wrong. DIFFA has no such part.

    Args:
        width: Width of the embeddings.
        max_words: Number of distinct positions; later words share the last one.
    """

    def __init__(self, width: int, max_words: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1)
        self.table = nn.Parameter(0.02 * torch.randn(max_words, width))

    def forward(self, values: Tensor, inside: Tensor) -> Tensor:
        """Number embeddings (B, N, W); those not ``inside`` (B, N) belong to no word.

        Adjacent embeddings whose gates are open are one word, as in CTC, and share its number.
        """
        opening = self.gate(values)[..., 0].sigmoid() * inside
        is_word = opening.detach() > 0.5
        begins = is_word.clone()
        begins[:, 1:] &= ~is_word[:, :-1]
        index = begins.cumsum(1) - is_word.long()
        numbers = self.table[index.clamp(0, len(self.table) - 1)]
        numbered: Tensor = values + opening[..., None] * numbers
        return numbered


def numbering_of(adapter: nn.Module) -> Numbering | None:
    """Return an adapter's ``numbering``, if it has one; its ``Embeds`` then have ``content``."""
    numbering = getattr(adapter, "numbering", None)  # no protocol: torch hides submodules from it
    return numbering if isinstance(numbering, Numbering) else None
