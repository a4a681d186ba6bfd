"""Llama: the shared Transformer under causal attention, in the Hugging Face layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffa.backbones import lora as adaptation
from diffa.backbones.attention import Kernel
from diffa.backbones.llada import check
from diffa.backbones.tokenizer import read_tokenizer
from diffa.backbones.transformer import Shape, Transformer, load
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError
from diffa.types import Vocab

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext

_NAMES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
_OUTER = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


class Llama(nn.Module):
    """Autoregressive language model of the Llama family, with the Transformer of ``llada``.

    Args:
        checkpoint: a folder or Hub id in the Hugging Face Llama layout.
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

    decoding: Literal["causal"] = "causal"

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
                causal=True,
                kernel=attn_implementation,
                gradient_checkpointing=gradient_checkpointing,
                compiling=compile,
            )
        self.tokenizer = read_tokenizer(tokenizer, folder)
        load(self.transformer, folder, seed, lambda at: rename(weights.read_weights(at)))
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


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give Llama's keys the names of the shared Transformer; rotary buffers are dropped."""
    renamed = {}
    for key, value in state.items():
        name, _, field = key.rpartition(".")
        inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if inner and inner[2] in _NAMES:
            renamed[f"blocks.{inner[1]}.{_NAMES[inner[2]]}.{field}"] = value
        elif field != "inv_freq":
            renamed[f"{_OUTER.get(name, name)}.{field}"] = value
    return renamed


def read(config: Mapping[str, Any], *, source: str | Path) -> tuple[Shape, Vocab]:
    """Read the size and the special ids from a Llama ``config.json``.

    Raises:
        CheckpointError: a field is missing, or asks for another architecture.
    """
    if config.get("hidden_act", "silu") != "silu" or config.get("mlp_bias", False):
        raise CheckpointError(f"{source}: the llama backbone computes SiLU gates without biases")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{source}: RoPE scaling {kind!r} is not known, only 'llama3' is")
    try:
        heads = config["num_attention_heads"]
        shape = Shape(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            hidden=config["intermediate_size"],
            vocab=config["vocab_size"],
            context=config.get("max_position_embeddings", 2048),
            theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            eps=config.get("rms_norm_eps", 1e-6),
            scaling=rope if kind == "llama3" else None,
            bias=config.get("attention_bias", False),
            tied=config.get("tie_word_embeddings", False),
            head_width=config.get("head_dim"),
        )
        # Llama 3 lists several ends; the last one closes a turn of its chat template.
        eos = config["eos_token_id"]
        eos = eos[-1] if isinstance(eos, list) else eos
    except KeyError as error:
        raise CheckpointError(f"{source}: the configuration lacks {error}") from None
    pad = eos if config.get("pad_token_id") is None else config["pad_token_id"]
    return check(shape, source), Vocab(shape.vocab, eos, pad, None)
