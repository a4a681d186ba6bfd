"""Layers of queries that read frames, shared by the adapters built of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.errors import SpecError


class Attention(nn.Module):
    """Multi-head attention of queries (M, Q, width) to other states (M, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, queries: Tensor, states: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Attend where ``sees`` (M, T) allows; every row must see something."""
        split = "m t (h d) -> m h t d"
        mixed = F.scaled_dot_product_attention(
            rearrange(self.query(queries), split, h=self.heads),
            rearrange(self.key(states), split, h=self.heads),
            rearrange(self.value(states), split, h=self.heads),
            attn_mask=None if attn_mask is None else attn_mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out(rearrange(mixed, "m h t d -> m t (h d)"))
        return out


class FeedForward(nn.Sequential):
    """Two linear maps with a GELU between, behind a norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )


def check(width: int, heads: int, dropout: float, **counts: int) -> None:
    """Raise SpecError for a count below one, a dropout out of range or heads that do not fit."""
    for name, value in counts.items():
        if value < 1:
            raise SpecError(f"{name} must be at least 1, got {value}")
    if not 0 <= dropout < 1:
        raise SpecError(f"dropout must lie between 0 and 1 (1 excluded), got {dropout}")
    if width % heads:
        raise SpecError(
            f"this adapter needs an encoder whose width is a multiple of its heads, "
            f"got {width} and {heads}"
        )


def bank(count: int, width: int) -> nn.Parameter:
    """Return learned queries (count, width), drawn with the deviation .02 of BERT's embeddings."""
    return nn.Parameter(torch.randn(count, width) * 0.02)
