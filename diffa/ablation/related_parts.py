"""Options that a part takes over from the part that it replaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffa.errors import SpecError

# The fields of the Transformer that LLaDA and Llama share: LLaDA's names, Llama's names.
_LLAMA_FIELDS = {
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


def options_to_keep(
    kind: str, old: Mapping[str, Any], name: str, known: Iterable[str]
) -> dict[str, Any]:
    """Return the options that the part ``name`` takes over from the part that it replaces.

    A Llama gets the size of the LLaDA that it replaces, so that only attention and objective
    differ.

    Args:
        kind: Kind of part.
        old: The part that is replaced.
        name: The new part.
        known: Options that the new part has.

    Raises:
        SpecError: The old part has weights, and nothing says which ones the new part has.
    """
    shared = {key: old[key] for key in _SHARED if key in old and key in known}
    if kind != "backbone":
        return shared
    if old["name"] == "llada" and name == "llama" and old.get("config"):
        return {**shared, "config": to_llama_config(old["config"])}
    if old.get("checkpoint") or old.get("config"):
        raise SpecError(
            f"backbone={name}: the recipe's {old['name']} has weights or a size of its own, and "
            f"nothing says which {name} has: write 'backbone={old['name']},{{name: {name}, "
            "checkpoint: ...}'"
        )
    return shared


def to_llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Llama configuration of the Transformer of a LLaDA configuration."""
    llama = {theirs: config[ours] for ours, theirs in _LLAMA_FIELDS.items() if ours in config}
    if config.get("embedding_size"):
        llama["vocab_size"] = config["embedding_size"]
    if not config.get("mlp_hidden_size"):
        llama["intermediate_size"] = config.get("mlp_ratio", 4) * config["d_model"]
    return {"model_type": "llama", "rms_norm_eps": 1e-5, **llama}
