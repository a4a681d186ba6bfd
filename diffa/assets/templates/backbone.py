"""A masked-diffusion language model of one layer, with random weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError
from diffa.types import Vocab


class Part(nn.Module):
    """One layer of bidirectional attention over ``words`` tokens; 0 ends, 1 pads, 2 masks."""

    decoding: Literal["masked"] = "masked"
    embed: nn.Embedding
    head: nn.Linear

    def __init__(self, *, width: int = 32, words: int = 64) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise SpecError(f"width must be even and at least 2, got {width}")
        if words < 4:
            raise SpecError(f"words must be at least 4, got {words}")
        self.width, self.vocab = width, Vocab(size=words, eos=0, pad=1, mask=2)
        self.tokenizer: Any = None
        self.embed = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W)."""
        x = embeds + self._places(positions).to(embeds.dtype)
        queries, keys, values = self.qkv(self.norm(x))[:, :, None].chunk(3, dim=-1)
        # the other slots' keys and values come from the memory, (B, S, 1, W)
        keys, values = context.update_cache(0, keys, values)
        mask = context.mask(positions, causal=False)
        mixed = scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if mask is None else mask[:, None],
        )
        hidden: Tensor = self.last(x + self.out(mixed[:, 0]))
        return hidden

    def _places(self, positions: Tensor) -> Tensor:
        """Sinusoids (B, K, W) of positions (B, K)."""
        even = torch.arange(0, self.width, 2, device=positions.device)
        angles = positions[..., None] / 10000 ** (even / self.width)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
