"""SDAR: Qwen3's layout with block-causal attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffa.backbones.llama import parse_llama_config, rename_llama_keys
from diffa.backbones.transformer import TransformerConfig
from diffa.backbones.transformer_backbone import TransformerBackbone, check_fields
from diffa.checkpoints import read as weights


class SDAR(TransformerBackbone):
    """Block-causal masked-diffusion model made from Qwen3 (SDAR, arXiv 2510.06303).

    Slots attend to their own block and to all blocks before it, so that keys and values of
    finished blocks are exact. Checkpoints have the published layout, Qwen3's.
    """

    decoding: Literal["masked"] = "masked"
    partial = True  # the last layer is computed for the output slots only

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in SDAR's ``config.json``."""
        check_fields(fields, {"use_sliding_window": (False,)}, source)
        return parse_llama_config(fields, source)._replace(qk_norm=True)

    def parse_block_length(self, fields: Mapping[str, Any]) -> int:
        """Return ``block_size``; the released models without it have blocks of 4."""
        return int(fields.get("block_size") or 4)

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder under the names of ``Transformer``."""
        return rename_llama_keys(weights.read_weights(folder))
