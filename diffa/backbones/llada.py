"""LLaDA: the shared Transformer under bidirectional attention, in the published layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffa.backbones import lora as adaptation
from diffa.backbones.attention import Kernel
from diffa.backbones.tokenizer import read_tokenizer
from diffa.backbones.transformer import Shape, Transformer, load
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError
from diffa.types import Vocab

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext

# What the native Transformer computes; a checkpoint that asks for anything else is refused.
_ASSUMED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "include_bias": False,
    "scale_logits": False,
}


class LLaDA(nn.Module):
    """Masked-diffusion language model (LLaDA, arXiv 2502.09992), grouped queries included.

    Args:
        checkpoint: a folder or Hub id in the published layout (``model.transformer.*``).
        revision: of the Hub repository.
        config: instead of a checkpoint, a published-layout ``config.json`` as a mapping; weights
            are then drawn from ``seed``.
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
    ragged = True  # padding costs nothing on a CPU: see ``backbones.ragged``
    partial = True  # the last layer is computed for the slots that are asked for

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
        load(
            self.transformer,
            folder,
            seed,
            lambda at: weights.read_weights(at, "model.transformer."),
        )
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
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W)."""
        hidden: Tensor = self.transformer(embeds, positions, context)
        return hidden


def read(config: Mapping[str, Any], *, source: str | Path) -> tuple[Shape, Vocab]:
    """Read the size and the special ids from a published ``config.json``.

    Raises:
        CheckpointError: a field is missing, or asks for another architecture.
    """
    for field, value in _ASSUMED.items():
        if config.get(field, value) != value:
            raise CheckpointError(
                f"{source}: {field} is {config[field]!r}; the llada backbone computes {value!r}"
            )
    try:
        heads, width = config["n_heads"], config["d_model"]
        shape = Shape(
            width=width,
            layers=config["n_layers"],
            heads=heads,
            groups=config.get("n_kv_heads")
            or (1 if config.get("multi_query_attention") else heads),
            hidden=config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * width,
            vocab=config.get("embedding_size") or config["vocab_size"],
            context=config.get("max_sequence_length", 4096),
            theta=config.get("rope_theta", 10000.0),
            eps=config.get("rms_norm_eps", 1e-5),
            bias=config.get("include_qkv_bias", False),
            tied=config.get("weight_tying", False),
        )
        eos = config["eos_token_id"]
        pad = eos if config.get("pad_token_id") is None else config["pad_token_id"]
        return check(shape, source), Vocab(shape.vocab, eos, pad, config["mask_token_id"])
    except KeyError as error:
        raise CheckpointError(f"{source}: the configuration lacks {error}") from None


def check(shape: Shape, source: str | Path) -> Shape:
    """Refuse sizes that no Transformer can have."""
    if shape.width % shape.heads or shape.heads % shape.groups or shape.head % 2:
        raise CheckpointError(
            f"{source}: width {shape.width}, {shape.heads} heads and {shape.groups} key heads "
            "do not divide: the width must split into even heads, the heads into key heads"
        )
    return shape
