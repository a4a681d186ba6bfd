"""Attention layers that the adapters with learned queries share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.errors import SpecError, check_at_least
from diffa.types import FeatureSpec


class MultiHeadAttention(nn.Module):
    """Multi-head attention of queries (M, Q, width) over states (M, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, queries: Tensor, states: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Attend where ``attn_mask`` (M, T) is True; every row needs one such place."""
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
    """A norm, then two linear layers with a GELU between them."""

    def __init__(self, width: int, intermediate_size: int) -> None:
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, intermediate_size),
            nn.GELU(),
            nn.Linear(intermediate_size, width),
        )


def check_sizes(source: FeatureSpec, dropout: float, **counts: int) -> None:
    """Raise SpecError for a count below one, a dropout out of range or heads that do not fit."""
    check_at_least(1, **counts)
    if not 0 <= dropout < 1:
        raise SpecError(f"dropout must lie between 0 and 1 (1 excluded), got {dropout}")
    if source.width % source.heads:
        raise SpecError(
            f"this adapter needs an encoder whose width is a multiple of its heads, "
            f"got {source.width} and {source.heads}"
        )


def learned_queries(count: int, width: int) -> nn.Parameter:
    """Return queries (count, width) drawn from N(0, 0.02), as BERT's embeddings are."""
    return nn.Parameter(torch.randn(count, width) * 0.02)
