"""Llama: the shared Transformer with causal attention, in the Hugging Face layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffa.backbones.transformer import TransformerConfig
from diffa.backbones.transformer_backbone import TransformerBackbone, check_fields
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError

_BLOCK_KEYS = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
_OUTER_KEYS = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


class Llama(TransformerBackbone):
    """Autoregressive language model of the Llama family, with LLaDA's Transformer.

    Checkpoints have the Hugging Face layout of Llama, Qwen2 or Qwen3; those of Fast-dLLM v2 and
    SDAR, which were made from Qwen, are read as causal models.
    """

    decoding: Literal["causal"] = "causal"

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in the ``config.json`` of a Llama or a Qwen."""
        kind = fields.get("model_type")
        check_fields(fields, {"use_sliding_window": (False,)}, source)
        # These layouts do not mention what all of their models have.
        biases = {"attention_bias": True} if kind in ("qwen2", "Fast_dLLM_Qwen") else {}
        parsed = parse_llama_config({**biases, **fields}, source)
        return parsed._replace(qk_norm=kind in ("qwen3", "sdar"))

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder under the names of ``Transformer``."""
        return rename_llama_keys(weights.read_weights(folder))


def rename_llama_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Llama's weights under the names of ``Transformer``, without rotary buffers."""
    renamed = {}
    for key, value in state.items():
        name, _, field = key.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if block and block[2] in _BLOCK_KEYS:
            renamed[f"blocks.{block[1]}.{_BLOCK_KEYS[block[2]]}.{field}"] = value
        elif field != "inv_freq":
            renamed[f"{_OUTER_KEYS.get(name, name)}.{field}"] = value
    return renamed


def parse_llama_config(fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
    """Return the configuration in a ``config.json`` of Llama's layout.

    Raises:
        KeyError: a field is missing.
        CheckpointError: the fields describe another architecture.
    """
    if fields.get("hidden_act", "silu") != "silu" or fields.get("mlp_bias", False):
        raise CheckpointError(f"{source}: the llama backbone computes SiLU gates without biases")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise CheckpointError(f"{source}: RoPE scaling {rope_type!r} is unknown; use 'llama3'")
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    return TransformerConfig(
        hidden_size=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or width // heads,
        intermediate_size=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        max_position_embeddings=fields.get("max_position_embeddings", 2048),
        rope_theta=rope.get("rope_theta", fields.get("rope_theta", 10000.0)),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_scaling=rope if rope_type == "llama3" else None,
        attention_bias=fields.get("attention_bias", False),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
    )
