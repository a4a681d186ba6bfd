"""Dream: the shared Transformer with bidirectional attention and logits shifted by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffa.backbones.llama import parse_llama_config, rename_llama_keys
from diffa.backbones.transformer import TransformerConfig
from diffa.backbones.transformer_backbone import TransformerBackbone
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext


class Dream(TransformerBackbone):
    """Masked-diffusion model made from Qwen2.5 (Dream 7B, Ye et al. 2025).

    As in the autoregressive model it comes from, the state of a slot predicts the *next* token.
    ``forward`` returns for every slot the state of the slot before it, from the KV cache where
    that slot is not recomputed, so ``head`` gives the logits of the slot's own token, as in LLaDA.
    Checkpoints have the published layout, Qwen2's.
    """

    decoding: Literal["masked"] = "masked"

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in Dream's ``config.json``."""
        if fields.get("use_sliding_window", False):
            raise CheckpointError(
                f"{source}: use_sliding_window is true; Dream attends to all slots"
            )
        # Qwen2's layout does not mention biases: queries, keys and values have them.
        return parse_llama_config({"attention_bias": True, **fields}, source)

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder under the names of ``Transformer``."""
        return rename_llama_keys(weights.read_weights(folder))

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        context: AttentionContext,
        layer_inputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W), shifted by one."""
        hidden: Tensor = self.transformer(embeds, positions, context, layer_inputs)
        # The states are cached as the keys of one more layer, (B, S, 1, W).
        layer = len(self.transformer.blocks)
        states, _ = context.update_cache(layer, hidden[:, :, None], hidden[:, :, None, :1])
        slots, exists = previous_slots(positions, context)
        previous = states[:, :, 0].gather(1, slots[..., None].expand(-1, -1, hidden.shape[2]))
        return torch.where(exists[..., None], previous, hidden)


def previous_slots(positions: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Return the slot (B, K) at the position before each query's, and whether there is one.

    Only slots that the query may attend to count; a slot of its own branch precedes a shared one.
    """
    keys = positions if context.positions is None else context.positions
    is_previous = keys[:, None] == positions[:, :, None] - 1  # (B, K, S)
    mask = context.mask(positions, causal=False)
    if mask is not None:
        is_previous = is_previous & mask
    rank = is_previous.int()
    branch, slots = context.branch, context.query_slots
    if branch is not None:
        own = branch if slots is None else branch.gather(1, slots)
        rank = rank + (is_previous & (branch[:, None] == own[:, :, None])).int()
    return rank.argmax(dim=2), is_previous.any(dim=2)
