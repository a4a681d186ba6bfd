"""Dream: the shared Transformer under bidirectional attention, with logits shifted by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffa.backbones import llama
from diffa.backbones import lora as adaptation
from diffa.backbones.attention import Kernel
from diffa.backbones.tokenizer import read_tokenizer
from diffa.backbones.transformer import Shape, Transformer, load
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError
from diffa.types import Vocab

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext


class Dream(nn.Module):
    """Masked-diffusion model made from Qwen2.5 (Ye et al. 2025, Dream 7B).

    As in the autoregressive model it grew from, a row tells the *next* token. Here every slot
    is given the hidden state of the slot before it, remembered where that one is not
    recomputed, so that ``head`` of a row gives the logits of the row's own token, as in LLaDA.

    Args:
        checkpoint: a folder or Hub id in the published layout, Qwen2's.
        revision: of the Hub repository.
        config: instead of a checkpoint, such a ``config.json`` as a mapping; weights are then
            drawn from ``seed``.
        tokenizer: folder or Hub id of the tokenizer; the checkpoint's own where None.
        attn_implementation: ``auto`` takes xformers on CUDA where it loads, SDPA elsewhere.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the window steps of cached decoding, for GPUs: see ``compiling``.
        lora: LoRA pairs, read or new, folded in or live: see ``lora.Options``.
        seed: of the weights where there is no checkpoint.

    Raises:
        CheckpointError: files are missing, or do not fit, or describe another architecture.
        SpecError: neither or both of ``checkpoint`` and ``config`` are given.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        attn_implementation: Kernel = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        lora: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        folder, found = weights.resolve_config(checkpoint, revision, config)
        shape, self.vocab = read(found, source=folder or "config")
        self.width, self.max_length = shape.width, shape.context
        with torch.device("meta") if folder else torch.get_default_device():
            self.transformer = Transformer(
                shape,
                causal=False,
                kernel=attn_implementation,
                gradient_checkpointing=gradient_checkpointing,
                compiling=compile,
            )
        self.tokenizer = read_tokenizer(tokenizer, folder)
        load(self.transformer, folder, seed, lambda at: llama.rename(weights.read_weights(at)))
        adaptation.adapt(self.transformer, lora, adaptation.TARGETS)

    @property
    def head(self) -> nn.Linear:
        """Hidden states (..., W) -> logits (..., V)."""
        return self.transformer.ff_out

    @property
    def lora(self) -> nn.Module:
        """The live LoRA pairs, by the checkpoint's names; empty where there are none."""
        return adaptation.view(self.transformer)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., W)."""
        embedded: Tensor = self.transformer.wte(tokens)
        return embedded

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W), shifted by one."""
        hidden: Tensor = self.transformer(embeds, positions, context)
        layer = len(self.transformer.blocks)  # one more in the memory, for the hidden states
        states, _ = context.update_cache(layer, hidden[:, :, None], hidden[:, :, None, :1])
        before, there = previous(positions, context)
        earlier = states[:, :, 0].gather(1, before[..., None].expand(-1, -1, hidden.shape[2]))
        return torch.where(there[..., None], earlier, hidden)


def previous(positions: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Return the slot (B, K) that holds the position before each query's, and whether one does.

    Only slots that the query may attend to count; one of its own branch goes before a shared one.
    """
    keys = positions if context.positions is None else context.positions
    near = keys[:, None] == positions[:, :, None] - 1
    mask = context.mask(positions, causal=False)
    if mask is not None:
        near = near & mask
    rank = near.int()
    if context.branch is not None:
        own = (
            context.branch
            if context.query_slots is None
            else context.branch.gather(1, context.query_slots)
        )
        rank = rank + (near & (context.branch[:, None] == own[:, :, None])).int()
    return rank.argmax(dim=2), near.any(dim=2)


def read(config: Mapping[str, Any], *, source: str | Path) -> tuple[Shape, Vocab]:
    """Read the size and the special ids from Dream's ``config.json``.

    Raises:
        CheckpointError: a field is missing, or asks for another architecture.
    """
    if config.get("use_sliding_window", False):
        raise CheckpointError(f"{source}: sliding windows are not Dream's")
    # Qwen2's layout says nothing of biases: queries, keys and values have them
    shape, vocab = llama.read({"attention_bias": True, **config}, source=source)
    mask = config.get("mask_token_id")
    if mask is None:
        raise CheckpointError(f"{source}: the configuration lacks 'mask_token_id'")
    return shape, vocab._replace(mask=mask)
