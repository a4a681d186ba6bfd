"""LLaDA-MoE: bidirectional attention with normalised heads, and experts as feed-forward."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffa.backbones.experts import mix_experts
from diffa.backbones.llama import parse_llama_config, rename_llama_keys
from diffa.backbones.transformer import Block, MoEConfig, TransformerConfig
from diffa.backbones.transformer_backbone import TransformerBackbone, check_fields
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError

# The only values that are computed here.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "qk_layernorm": (True,),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_enable_expert_bias": (None, False),
    "shared_expert_intermediate_size": (None, 0),
    "routed_scaling_factor": (None, 1),
    "partial_rotary_factor": (None, 1),
    "clip_qkv": (None,),
}
_EXPERT_KEY = re.compile(r"blocks\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


class MoEFeedForward(nn.Module):
    """Gated feed-forward networks ("experts"), a few of which process each token.

    No expert has a capacity, so every token is processed by all experts it is routed to.
    """

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        experts, intermediate = moe.num_experts, moe.intermediate_size
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate, width))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, intermediate))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., W)."""
        flat = x.flatten(0, -2)  # (tokens, W)
        weight, experts = self.route(flat)
        out = mix_experts(flat, experts, weight, self.gate_proj, self.up_proj, self.down_proj)
        return out.view_as(x)

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and index, (tokens, K) each, of the K experts of every token."""
        probs = self.gate(flat).float().softmax(dim=-1)
        top_probs, top_experts = probs.topk(self.moe.num_experts_per_tok, dim=-1)
        if self.moe.norm_topk_prob:
            top_probs = top_probs / top_probs.sum(dim=-1, keepdim=True)
        return top_probs, top_experts


class MoEBlock(Block):
    """A layer with experts as feed-forward."""

    experts_class: ClassVar[type[MoEFeedForward]] = MoEFeedForward

    def init_feed_forward(self, config: TransformerConfig, layer: int) -> None:
        """Create the experts, or the dense feed-forward of the first layers."""
        assert config.moe is not None
        self.dense = layer < config.moe.dense_layers
        if self.dense:
            super().init_feed_forward(config, layer)
        else:
            self.experts = self.experts_class(config.hidden_size, config.moe)

    def feed_forward(self, h: Tensor) -> Tensor:
        """Map normalised states (B, R, W)."""
        out: Tensor = super().feed_forward(h) if self.dense else self.experts(h)
        return out


class LLaDAMoE(TransformerBackbone):
    """Masked-diffusion mixture of experts (LLaDA-MoE, arXiv 2509.24389: 7 B, 1.4 B active).

    Llama's layout with a norm on every head's queries and keys. A softmax over all experts of a
    layer weights those with the largest probabilities. ``compile`` is not supported: the experts'
    token counts differ in every pass. LoRA adapts the attention's projections by default.
    """

    decoding: Literal["masked"] = "masked"
    block_class = MoEBlock
    lora_target_modules = ("q_proj", "k_proj", "v_proj", "attn_out")
    compilable = False

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in LLaDA-MoE's ``config.json``."""
        check_fields(fields, _REQUIRED, source)
        if not all(fields.get("moe_layer_freq") or [1]):
            raise CheckpointError(f"{source}: some layers have no experts (moe_layer_freq)")
        moe = MoEConfig(
            num_experts=fields["num_experts"],
            num_experts_per_tok=fields["num_experts_per_tok"],
            intermediate_size=fields["expert_intermediate_size"],
            norm_topk_prob=bool(fields.get("norm_topk_prob")),
        )
        fields = {"intermediate_size": moe.intermediate_size, "rms_norm_eps": 1e-5, **fields}
        return parse_llama_config(fields, source)._replace(moe=moe, qk_norm=True)

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder under the names of ``Transformer``."""
        moe = self.transformer.config.moe
        assert moe is not None
        state = rename_llama_keys(weights.read_weights(folder))
        return stack_experts(state, moe.num_experts, folder)


def stack_experts(
    state: Mapping[str, Tensor], num_experts: int, source: str | Path
) -> dict[str, Tensor]:
    """Return the weights with the experts of each layer and projection in one tensor.

    Raises:
        CheckpointError: an expert is missing.
    """
    renamed: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        name = key.replace("model.layers.", "blocks.").replace(".self_attn.", ".")
        if match := _EXPERT_KEY.fullmatch(name):
            stacked = f"blocks.{match[1]}.experts.{match[3]}_proj"
            experts.setdefault(stacked, {})[int(match[2])] = value
        else:
            renamed[name.replace(".mlp.gate.", ".experts.gate.")] = value
    for stacked, parts in experts.items():
        if missing := sorted(set(range(num_experts)) - parts.keys()):
            raise CheckpointError(f"{source} lacks experts {missing[:6]} of {stacked}")
        renamed[stacked] = torch.stack([parts[expert] for expert in range(num_experts)])
    return renamed
