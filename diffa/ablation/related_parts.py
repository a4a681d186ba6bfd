"""What a part that takes another's place takes over from it: options both have, and a size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffa.errors import SpecError

# LLaDA's names and Llama's for the fields of the Transformer that both are made of.
_FIELDS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "include_qkv_bias": "attention_bias",
    "weight_tying": "tie_word_embeddings",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_SHARED = (
    "tokenizer",
    "attn_implementation",
    "gradient_checkpointing",
    "seed",
    "block_length",
    "temperature",
    "stop_at_eos",
)


def related(kind: str, old: Mapping[str, Any], name: str, known: Iterable[str]) -> dict[str, Any]:
    """Options for the part ``name`` where ``old`` stood: a Llama gets the size of the LLaDA it
    replaces, so that attention and objective are all that differs.

    Raises:
        SpecError: the old part has weights, and nothing says which ones the new part has.
    """
    taken = {key: old[key] for key in _SHARED if key in old and key in known}
    if kind != "backbone":
        return taken
    if old["name"] == "llada" and name == "llama" and old.get("config"):
        return {**taken, "config": as_llama(old["config"])}
    if old.get("checkpoint") or old.get("config"):
        raise SpecError(
            f"backbone={name}: the recipe's {old['name']} has weights or a size of its own, and "
            f"nothing says which {name} has: write 'backbone={old['name']},{{name: {name}, "
            "checkpoint: ...}'"
        )
    return taken


def as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """The Llama configuration of the Transformer that a LLaDA configuration describes."""
    found = {theirs: config[ours] for ours, theirs in _FIELDS.items() if ours in config}
    if config.get("embedding_size"):
        found["vocab_size"] = config["embedding_size"]
    if not config.get("mlp_hidden_size"):
        found["intermediate_size"] = config.get("mlp_ratio", 4) * config["d_model"]
    return {"model_type": "llama", "rms_norm_eps": 1e-5, **found}
