"""causal and dream: parity with transformers, the memory, the shift, checkpoints, errors."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from diffa.backbones.causal import Causal
from diffa.backbones.dream import Dream, previous_slots
from diffa.canvas.kv_cache import AttentionContext, KVCache
from diffa.errors import CheckpointError, SpecError
from diffa.testing import BackboneSuite

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
    "pad_token_id": 2,
}
GPT = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
}
MODELS = {
    "llama": dict(model_type="llama", **SMALL),
    "qwen2": dict(model_type="qwen2", **SMALL),
    "qwen3": dict(model_type="qwen3", **SMALL, head_dim=8),
    "mistral": dict(model_type="mistral", **SMALL, sliding_window=32),
    "gemma2": dict(model_type="gemma2", **SMALL, head_dim=8, final_logit_softcapping=2.0),
    "granite": dict(model_type="granite", **SMALL, logits_scaling=4.0),
    "cohere": dict(model_type="cohere", **SMALL, logit_scale=0.25),
    "olmoe": dict(model_type="olmoe", **SMALL, num_experts=4, num_experts_per_tok=2),
    "gpt2": dict(**GPT, eos_token_id=3, pad_token_id=2),
}
DREAM = dict(model_type="Dream", **SMALL, mask_token_id=39, rms_norm_eps=1e-6, rope_theta=1e4)


class TestCausalLlama(BackboneSuite):
    name = "causal"
    options = {"config": MODELS["llama"]}


class TestCausalQwen(BackboneSuite):
    name = "causal"
    options = {"config": MODELS["qwen2"]}
    # under a softmax over keys, a bias of the keys is the same for all
    idle = ("*.k_proj.bias",)


class TestDream(BackboneSuite):
    name = "dream"
    options = {"config": DREAM}
    idle = ("*.k_proj.bias",)


def tokens(rows=2, length=9):
    return torch.randint(4, 39, (rows, length), generator=torch.Generator().manual_seed(0))


def positions(count, rows=2):
    return torch.arange(count).expand(rows, -1)


# causal


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_causal_models_equal_transformers(name):
    backbone = Causal(config=MODELS[name]).eval()
    ids = tokens()
    expected = backbone.model(ids).logits
    hidden = backbone(backbone.embed(ids), positions(9), AttentionContext())
    assert torch.allclose(backbone.head(hidden), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_token_at_a_time_equals_all_at_once(name):
    backbone = Causal(config=MODELS[name]).eval()
    embeds, memory = backbone.embed(tokens()), KVCache()
    whole = backbone(embeds, positions(9), AttentionContext())
    memory.reserve(2, 9)
    every = positions(9)
    for slot in range(9):
        slots = torch.full((2, 1), slot)
        context = AttentionContext(
            valid=every <= slot, positions=every, query_slots=slots, kv_cache=memory, write=True
        )
        found = backbone(embeds[:, slot : slot + 1], slots, context)
        assert torch.allclose(found[:, 0], whole[:, slot], atol=1e-5)


@torch.no_grad()
def test_padding_in_the_middle_does_not_leak():
    backbone = Causal(config=MODELS["gemma2"]).eval()
    embeds = backbone.embed(tokens())
    gap = torch.cat([embeds[:, :4], 9 * torch.randn(2, 2, 16), embeds[:, 4:]], dim=1)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]] * 2).bool()
    at = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]] * 2)
    found = backbone(gap, at, AttentionContext(valid=valid, positions=at))
    plain = backbone(embeds, positions(9), AttentionContext())
    assert torch.allclose(found[valid].view_as(plain), plain, atol=1e-5)


def test_a_sliding_window_bounds_the_context():
    assert Causal(config=MODELS["mistral"]).max_length == 32
    assert Causal(config=MODELS["qwen2"]).max_length == 64


def test_rotary_frequencies_stay_exact_in_bfloat16():
    backbone = Causal(config=MODELS["llama"])
    before = backbone.model.model.rotary_emb.inv_freq.clone()
    backbone.to(torch.bfloat16)
    after = backbone.model.model.rotary_emb.inv_freq
    assert after.dtype == torch.float32 and after.equal(before)
    assert backbone.model.lm_head.weight.dtype == torch.bfloat16


def test_a_causal_checkpoint_loads_with_its_ids(tmp_path):
    model = Causal(config=MODELS["qwen2"], seed=5).model
    model.save_pretrained(tmp_path)
    backbone = Causal(checkpoint=str(tmp_path))
    assert backbone.vocab == (40, 3, 2, None)
    pairs = zip(model.parameters(), backbone.model.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    with torch.device("meta"):
        dry = Causal(checkpoint=str(tmp_path))
    assert all(value.is_meta for value in dry.parameters())


def test_gradients_flow_under_checkpointing():
    backbone = Causal(config=MODELS["llama"], gradient_checkpointing=True).train()
    embeds = backbone.embed(tokens()).detach().requires_grad_()
    backbone(embeds, positions(9), AttentionContext()).square().sum().backward()
    assert embeds.grad.isfinite().all()


MAMBA = {
    "model_type": "mamba",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "eos_token_id": 3,
}


@pytest.mark.parametrize(
    "config, error, told",
    [
        ({"model_type": "lama"}, SpecError, "knows no model_type 'lama'"),
        (MAMBA, CheckpointError, "linear_attention keep a recurrent state"),
        (dict(MODELS["llama"], eos_token_id=None), CheckpointError, "lacks eos_token_id"),
        (None, SpecError, "give either checkpoint"),
    ],
)
def test_causal_refuses_what_it_cannot_drive(config, error, told):
    with pytest.raises(error, match=told):
        Causal(config=config)


# dream


def qwen(backbone):
    """Qwen2 of transformers with Dream's weights."""
    state = {}
    names = {"attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj"}
    names |= {"ff_out": "mlp.down_proj", "attn_norm": "input_layernorm"}
    names |= {"ff_norm": "post_attention_layernorm"}
    names |= {x: f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj")}
    outer = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    for key, value in backbone.transformer.state_dict().items():
        first, *rest = key.split(".")
        if first == "blocks":
            state[f"model.layers.{rest[0]}.{names[rest[1]]}.{rest[2]}"] = value.clone()
        else:
            state[f"{outer[first]}.{rest[0]}"] = value.clone()
    settings = {key: value for key, value in DREAM.items() if key != "model_type"}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)).eval()
    model.load_state_dict(state)
    return model


def stirred():
    backbone = Dream(config=DREAM).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in backbone.parameters():  # biases are drawn as zero: let them count
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return backbone


@torch.no_grad()
def test_dream_is_a_bidirectional_qwen_shifted_by_one():
    backbone, ids = stirred(), tokens()
    everything = torch.zeros(2, 1, 9, 9)
    logits = qwen(backbone)(ids, attention_mask=everything).logits
    expected = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    hidden = backbone(backbone.embed(ids), positions(9), AttentionContext())
    assert torch.allclose(backbone.head(hidden), expected, atol=1e-4)


def test_a_published_dream_loads(tmp_path):
    backbone = stirred()
    qwen(backbone).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DREAM))
    loaded = Dream(checkpoint=str(tmp_path))
    assert loaded.vocab == (40, 3, 2, 39)
    pairs = zip(backbone.parameters(), loaded.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


@torch.no_grad()
def test_the_slot_before_a_block_is_remembered():
    backbone = stirred()
    embeds, memory = backbone.embed(tokens()), KVCache()
    memory.reserve(2, 9)
    every = positions(9)
    whole = backbone(embeds, every, AttentionContext(positions=every, kv_cache=memory, write=True))
    slots = torch.tensor([[5, 6], [3, 4]])
    context = AttentionContext(positions=every, query_slots=slots, kv_cache=memory)
    picked = embeds.gather(1, slots[..., None].expand(-1, -1, 16))
    found = backbone(picked, slots, context)
    expected = whole.gather(1, slots[..., None].expand(-1, -1, 16))
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_slot_before_is_found_by_position_and_branch():
    at = torch.tensor([[0, 1, 9, 2, 2, 3]])  # slot 2 is padding, slot 4 a draft of slot 3's place
    context = AttentionContext(
        valid=torch.tensor([[1, 1, 0, 1, 1, 1]]).bool(),
        positions=at,
        branch=torch.tensor([[0, 0, 0, 0, 1, 1]]),
    )
    before, there = previous_slots(at, context)
    assert before[0, [1, 3, 4, 5]].tolist() == [0, 1, 1, 4]
    assert there[0].tolist() == [False, True, False, True, True, True]


def test_dream_without_a_mask_token_is_refused():
    config = {key: value for key, value in DREAM.items() if key != "mask_token_id"}
    with pytest.raises(CheckpointError, match="names the mask token"):
        Dream(config=config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_threads_take_turns_where_rope_changes_with_the_length(kind):
    """Transformers keeps such frequencies on the module."""
    more = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, **more}
    model = Causal(
        config={
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 50,
            "max_position_embeddings": 64,
            "eos_token_id": 1,
            "rope_parameters": rope | {"original_max_position_embeddings": 64},
        }
    ).eval()
    inside, most, body = [], [], model.model.base_model.forward

    def forward(*args, **options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        found = body(*args, **options)
        inside.pop()
        return found

    model.model.base_model.forward = forward

    def work(count):
        with torch.no_grad():
            for _ in range(4):
                model(torch.randn(1, count, 64), torch.arange(count)[None], AttentionContext())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (40, 100)))
    assert set(most) == {1} and len(most) == 8
