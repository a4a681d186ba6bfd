"""LLaDA-MoE against transformers' Qwen3-MoE, whose layers it has, without its causal mask."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from diffa.backbones import transformer_backbone
from diffa.backbones.llada_moe import LLaDAMoE, MoEFeedForward
from diffa.backbones.transformer import MoEConfig
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import CheckpointError, SpecError
from diffa.testing import BackboneSuite

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "expert_intermediate_size": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": None,
    "qk_layernorm": True,
    "moe_layer_freq": [1, 1],
    "moe_router_score_function": "softmax",
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "vocab_size": 20,
    "eos_token_id": 17,
    "pad_token_id": 18,
    "mask_token_id": 19,
}


class TestLLaDAMoE(BackboneSuite):
    part = LLaDAMoE
    options = {"config": CONFIG}
    rounding = 2.0  # bfloat16 may send a token to other experts


def stirred(**changes):
    model = LLaDAMoE(config={**CONFIG, **changes}).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
            base = 0.0 if weight.dim() > 1 else 1.0
            weight.copy_(base + scale * torch.randn(weight.shape, generator=generator))
    return model


def published(model):
    """The model's weights under the published names, every expert apart."""
    names = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
             "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
             "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
             "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
             "experts.gate": "mlp.gate"}  # fmt: skip
    outer = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    state = {}
    for key, value in model.transformer.state_dict().items():
        name, _, field = key.rpartition(".")
        if not name.startswith("blocks."):
            state[f"{outer[name]}.{field}"] = value
            continue
        layer, inner = name.split(".", 2)[1:]
        if inner == "experts":
            for number, part in enumerate(value):
                state[f"model.layers.{layer}.mlp.experts.{number}.{field}.weight"] = part.clone()
        else:
            state[f"model.layers.{layer}.{names[inner]}.{field}"] = value
    return state


@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_qwen3_moe_that_sees_both_ways(scaled):
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    ours = stirred(norm_topk_prob=scaled)
    theirs = Qwen3MoeModel(
        Qwen3MoeConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=4, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=2,
            norm_topk_prob=scaled, rms_norm_eps=1e-5, vocab_size=20, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
            attn_implementation="eager", pad_token_id=18,
        )
    ).eval()  # fmt: skip
    state = {}
    for key, value in published(ours).items():
        if key.startswith("model.") and ".experts." not in key:
            state[key.removeprefix("model.")] = value
    for layer, block in enumerate(ours.transformer.blocks):
        both = torch.cat([block.experts.gate_proj, block.experts.up_proj], dim=1)
        state[f"layers.{layer}.mlp.experts.gate_up_proj"] = both
        state[f"layers.{layer}.mlp.experts.down_proj"] = block.experts.down_proj
    theirs.load_state_dict(state)
    embeds = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5))
    positions = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        due = theirs(
            inputs_embeds=embeds, position_ids=positions, use_cache=False,
            attention_mask=torch.zeros(2, 1, 9, 9),
        ).last_hidden_state  # fmt: skip
        found = ours(embeds, positions, AttentionContext())
    assert torch.allclose(found, due, atol=1e-5)


def test_published_weights_load(tmp_path):
    model = stirred()
    save_file(published(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    again = LLaDAMoE(checkpoint=str(tmp_path))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again.vocab == model.vocab == (20, 17, 18, 19)
    state = published(model)
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks experts \[3\]"):
        LLaDAMoE(checkpoint=str(tmp_path))


def test_every_token_visits_the_experts_with_the_largest_shares():
    torch.manual_seed(0)
    part = MoEFeedForward(8, MoEConfig(5, 2, intermediate_size=6, norm_topk_prob=False))
    for weight in part.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(3, 4, 8)
    shares = part.gate(x).softmax(-1)
    best = shares.topk(2, -1)
    due = torch.zeros_like(x)
    for number in range(5):
        inner = torch.nn.functional.silu(x @ part.gate_proj[number].T) * (
            x @ part.up_proj[number].T
        )
        chosen = (best.indices == number).any(-1, keepdim=True)
        due += torch.where(chosen, shares[..., number : number + 1], 0) * (
            inner @ part.down_proj[number].T
        )
    assert torch.allclose(part(x), due, atol=1e-5)


def test_the_mask_token_comes_from_the_tokenizer_if_the_configuration_names_none(monkeypatch):
    config = {key: value for key, value in CONFIG.items() if key != "mask_token_id"}
    with pytest.raises(CheckpointError, match="names the mask token"):
        LLaDAMoE(config=config)
    tokenizer = SimpleNamespace(mask_token_id=3)
    monkeypatch.setattr(transformer_backbone, "load_tokenizer", lambda *_: tokenizer)
    assert LLaDAMoE(config=config).vocab.mask == 3
    assert LLaDAMoE(config=CONFIG).vocab.mask == 19


def test_compile_is_refused():
    with pytest.raises(SpecError, match="cannot be compiled"):
        LLaDAMoE(config=CONFIG, compile=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shared_expert_intermediate_size", 64),
        ("moe_router_score_function", "sigmoid"),
        ("qk_layernorm", False),
        ("moe_layer_freq", [0, 1]),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_another_architecture_is_refused(field, value):
    with pytest.raises(CheckpointError, match=field):
        LLaDAMoE(config={**CONFIG, field: value})
