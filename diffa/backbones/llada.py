"""LLaDA: the shared Transformer with bidirectional attention, in the published layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffa.backbones.transformer import TransformerConfig
from diffa.backbones.transformer_backbone import TransformerBackbone, check_fields
from diffa.checkpoints import read as weights

# The only values that the shared Transformer computes.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "include_bias": (False,),
    "scale_logits": (False,),
}


class LLaDA(TransformerBackbone):
    """Masked-diffusion language model (LLaDA, arXiv 2502.09992), grouped queries included.

    Checkpoints have the published layout, ``model.transformer.*``.
    """

    decoding: Literal["masked"] = "masked"
    ragged = True  # a CPU computes nothing for padding: see ``backbones.ragged``
    partial = True  # the last layer is computed for the output slots only
    block_origin = "prompt"  # with a ``block_length``: the prompt is one block (BD3-LM, D2F)

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in LLaDA's ``config.json``."""
        check_fields(fields, _REQUIRED, source)
        heads, width = fields["n_heads"], fields["d_model"]
        kv_heads = 1 if fields.get("multi_query_attention") else heads
        return TransformerConfig(
            hidden_size=width,
            num_layers=fields["n_layers"],
            num_heads=heads,
            num_kv_heads=fields.get("n_kv_heads") or kv_heads,
            head_dim=width // heads,
            intermediate_size=fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * width,
            vocab_size=fields.get("embedding_size") or fields["vocab_size"],
            max_position_embeddings=fields.get("max_sequence_length", 4096),
            rope_theta=fields.get("rope_theta", 10000.0),
            rms_norm_eps=fields.get("rms_norm_eps", 1e-5),
            attention_bias=fields.get("include_qkv_bias", False),
            tie_word_embeddings=fields.get("weight_tying", False),
        )

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder; the names are LLaDA's own."""
        return weights.read_weights(folder, "model.transformer.")
