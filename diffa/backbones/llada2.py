"""LLaDA2: block-causal attention, partial RoPE, and experts chosen by groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffa.backbones.llada_moe import MoEBlock, MoEFeedForward, stack_experts
from diffa.backbones.transformer import MoEConfig, TransformerConfig, swiglu
from diffa.backbones.transformer_backbone import TransformerBackbone, check_fields
from diffa.checkpoints import read as weights
from diffa.runtime.cpu_linear import Linear
from diffa.types import Vocab

# The only values that are computed here.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "norm_topk_prob": (True,),
    "moe_router_enable_expert_bias": (True,),
    "use_bias": (False,),
    "use_qk_norm": (True,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
}
_KEYS = {
    "model.word_embeddings": "wte",
    "model.norm": "ln_f",
    "lm_head": "ff_out",
    "attention.query_layernorm": "q_norm",
    "attention.key_layernorm": "k_norm",
    "attention.dense": "attn_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate": "experts.gate",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "mlp.shared_experts.gate_proj": "experts.shared.gate_proj",
    "mlp.shared_experts.up_proj": "experts.shared.up_proj",
    "mlp.shared_experts.down_proj": "experts.shared.down_proj",
}
_FUSED = "attention.query_key_value"


class SharedExpert(nn.Module):
    """Gated feed-forward that every token passes."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, intermediate, bias=False)
        self.up_proj = Linear(width, intermediate, bias=False)
        self.down_proj = Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., W)."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class GroupedMoE(MoEFeedForward):
    """Experts chosen among the best groups by sigmoid scores plus a bias (DeepSeek-V3's router)."""

    bias: Tensor

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__(width, moe)
        # Balances the experts' load; part of their choice, not of their weight: no gradient.
        self.register_buffer("bias", torch.zeros(moe.num_experts))
        self.shared = SharedExpert(width, moe.shared_size) if moe.shared_size else None

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and index, (tokens, K) each, of the K experts of every token."""
        moe = self.moe
        wide = torch.promote_types(flat.dtype, torch.float32)
        scores = nn.functional.linear(flat.to(wide), self.gate.weight.to(wide)).sigmoid()
        ranked = scores + self.bias.to(wide)
        groups = ranked.view(len(ranked), moe.num_groups, -1)  # (tokens, groups, experts of each)
        # The score of a group is the sum of its two best experts.
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
        best_groups = best.topk(moe.topk_groups, dim=-1).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, best_groups, True)
        ranked = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        experts = ranked.topk(moe.num_experts_per_tok, dim=-1).indices
        weight = scores.gather(1, experts)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20) * moe.scale
        return weight, experts

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., W)."""
        out = super().forward(x)
        return out if self.shared is None else out + self.shared(x)


class GroupedMoEBlock(MoEBlock):
    """A layer with grouped experts as feed-forward."""

    experts_class = GroupedMoE


class LLaDA2(TransformerBackbone):
    """Block-causal mixture of experts (LLaDA2.0 and 2.1, arXiv 2512.15745: 16 B and 100 B).

    Slots attend to their own block and to all blocks before it. ``compile`` is not supported: the
    experts' token counts differ in every pass. LoRA adapts the attention's projections by default.
    """

    decoding: Literal["masked"] = "masked"
    partial = True  # the last layer is computed for the output slots only
    block_class = GroupedMoEBlock
    lora_target_modules = ("q_proj", "k_proj", "v_proj", "attn_out")
    compilable = False

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in LLaDA2's ``config.json``."""
        check_fields(fields, _REQUIRED, source)
        width, heads = fields["hidden_size"], fields["num_attention_heads"]
        head_dim = fields.get("head_dim") or width // heads
        intermediate = fields["moe_intermediate_size"]
        share = fields.get("partial_rotary_factor", 1.0)
        return TransformerConfig(
            hidden_size=width,
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            intermediate_size=fields["intermediate_size"],
            vocab_size=fields["vocab_size"],
            max_position_embeddings=fields.get("max_position_embeddings", 32768),
            rope_theta=fields.get("rope_theta", 600000.0),
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            attention_bias=fields.get("use_qkv_bias", False),
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            qk_norm=True,
            rotary_dim=fields.get("rotary_dim") or int(head_dim * share),
            moe=MoEConfig(
                num_experts=fields["num_experts"],
                num_experts_per_tok=fields["num_experts_per_tok"],
                intermediate_size=intermediate,
                norm_topk_prob=True,
                dense_layers=fields.get("first_k_dense_replace", 0),
                shared_size=intermediate * (fields.get("num_shared_experts") or 0),
                num_groups=fields.get("n_group") or 1,
                topk_groups=fields.get("topk_group") or 1,
                scale=fields.get("routed_scaling_factor", 1.0),
            ),
        )

    def _vocab(self, fields: Mapping[str, Any], size: int, source: str | Path) -> Vocab:
        # The published configuration names padding alone, which ends answers too.
        return super()._vocab({"eos_token_id": fields["pad_token_id"], **fields}, size, source)

    def parse_block_length(self, fields: Mapping[str, Any]) -> int:
        """Return ``block_length``; the released models have blocks of 32."""
        return int(fields.get("block_length") or 32)

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder under the names of ``Transformer``."""
        config = self.transformer.config
        assert config.moe is not None
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        state: dict[str, Tensor] = {}
        for key, value in weights.read_weights(folder).items():
            name, _, field = key.rpartition(".")
            layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            prefix, inner = (f"blocks.{layer[1]}.", layer[2]) if layer else ("", name)
            if field == "expert_bias":
                state[f"{prefix}experts.bias"] = value
            elif inner == _FUSED and len(value) == queries + 2 * keys:
                parts = torch.split(value, [queries, keys, keys])
                for part, own in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                    state[f"{prefix}{part}.{field}"] = own.contiguous()
            else:
                state[f"{prefix}{_KEYS.get(inner, inner)}.{field}"] = value
        return stack_experts(state, config.moe.num_experts, folder)
