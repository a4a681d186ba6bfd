"""Fast-dLLM v2: Qwen2.5's layout with block-causal attention and logits shifted by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffa.backbones.llama import parse_llama_config, rename_llama_keys
from diffa.backbones.transformer import TransformerConfig
from diffa.backbones.transformer_backbone import TransformerBackbone, check_fields
from diffa.checkpoints import read as weights


class FastDLLM2(TransformerBackbone):
    """Block-causal masked-diffusion model made from Qwen2.5 (Fast-dLLM v2, arXiv 2509.26328).

    The state of a slot predicts the token of the next slot, as in the autoregressive model; the
    first token of a block is the prediction of the block before. Checkpoints have the published
    layout, Qwen2's.
    """

    decoding: Literal["masked"] = "masked"
    shifted = True

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in Fast-dLLM v2's ``config.json``."""
        check_fields(fields, {"use_sliding_window": (False,)}, source)
        # Qwen2's layout does not mention biases: queries, keys and values have them.
        return parse_llama_config({"attention_bias": True, **fields}, source)

    def parse_block_length(self, fields: Mapping[str, Any]) -> int:
        """Return ``bd_size``; 32 is the released models'."""
        return int(fields.get("bd_size") or 32)

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder under the names of ``Transformer``."""
        return rename_llama_keys(weights.read_weights(folder))
