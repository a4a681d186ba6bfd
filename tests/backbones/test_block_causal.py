"""Block-causal backbones: what a slot sees, how files are read, what is refused."""

import pytest
import torch
from backbones.test_transformers_backbones import MODELS
from helpers import small
from test_combinations import LLADA2, QWEN

from diffa.backbones.fast_dllm import FastDLLM2
from diffa.backbones.llada2 import LLaDA2
from diffa.backbones.sdar import SDAR
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import CheckpointError, SpecError
from diffa.testing import BackboneSuite
from diffa.types import BlockAttention, block_attention

KINDS = {
    "sdar": lambda **o: SDAR(config=QWEN, **o),
    "llada2": lambda **o: LLaDA2(config=LLADA2, **o),
    "fastdllm2": lambda **o: FastDLLM2(config=QWEN, **o),
    "llada": lambda **o: small.backbone(**o),
}


class TestSDAR(BackboneSuite):
    part = SDAR
    options = {"config": QWEN}


class TestLLaDA2(BackboneSuite):
    part = LLaDA2
    options = {"config": LLADA2}
    rounding = 2.0  # bfloat16 may send a token to other experts


class TestFastDLLM2(BackboneSuite):
    part = FastDLLM2
    options = {"config": QWEN, "block_length": 8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 3, 4])
def test_a_slot_sees_its_block_and_those_before_it(kind, block):
    """Changing one slot changes the states from the beginning of its block on, and none before."""
    model = KINDS[kind](block_length=block).eval()
    embeds = torch.randn(1, 11, model.width, generator=torch.Generator().manual_seed(1))
    origin = 2 if kind == "llada" else 0  # LLaDA counts blocks from the end of the prompt
    context = AttentionContext(block_origin=torch.tensor([2]) if origin else None)
    positions = torch.arange(11)[None]
    with torch.no_grad():
        before = model(embeds, positions, context)
        for slot in range(11):
            other = embeds.clone()
            other[0, slot] = -3 * other[0, slot]
            after = model(other, positions, context)
            changed = ((after - before).abs().amax(dim=2) > 1e-6)[0]
            first = (slot - origin) // block * block + origin if slot >= origin else 0
            assert changed.tolist() == [place >= first for place in range(11)]


def test_blocks_come_from_the_configuration_or_the_option():
    assert SDAR(config=QWEN).block_length == 4
    assert SDAR(config={**QWEN, "block_size": 16}).block_length == 16
    assert FastDLLM2(config={**QWEN, "bd_size": 8}).block_length == 8
    assert LLaDA2(config=LLADA2).block_length == 32
    assert LLaDA2(config=LLADA2, block_length=8).block_length == 8
    assert block_attention(small.backbone()) is None
    assert block_attention(small.backbone(block_length=8)) == BlockAttention(8, True, False)
    assert block_attention(FastDLLM2(config=QWEN)) == BlockAttention(32, False, True)


def test_ids_that_a_configuration_lacks_are_options():
    config = {key: value for key, value in LLADA2.items() if key != "mask_token_id"}
    with pytest.raises(CheckpointError, match="mask_token_id"):
        LLaDA2(config=config)
    vocab = LLaDA2(config=config, mask_token_id=39, eos_token_id=4).vocab
    assert (vocab.mask, vocab.eos, vocab.pad) == (39, 4, 3)
    assert LLaDA2(config=LLADA2).vocab.eos == 3  # the published files name padding alone


@pytest.mark.parametrize(
    ("field", "value"),
    [("score_function", "softmax"), ("use_bias", True), ("rope_scaling", {"type": "yarn"})],
)
def test_what_llada2_does_not_compute_is_refused(field, value):
    with pytest.raises(CheckpointError, match=field):
        LLaDA2(config={**LLADA2, field: value})


def test_a_causal_backbone_takes_no_blocks():
    from diffa.backbones.llama import Llama

    with pytest.raises(SpecError, match="block_length"):
        Llama(config=MODELS["llama"], block_length=4)


def test_a_bias_chooses_experts_and_does_not_weigh_them():
    model = LLaDA2(config=LLADA2).eval()
    experts = model.get_submodule("transformer.blocks.1.experts")
    states = torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        weights, chosen = experts.route(states)
        assert torch.allclose(weights.sum(dim=1), torch.ones(30), atol=1e-5)
        # both experts of a token come from one of the two groups
        assert (chosen[:, 0] // 2 == chosen[:, 1] // 2).all()
        experts.bias[2:] = 5.0
        after, chosen = experts.route(states)
        assert (chosen >= 2).all()
        assert after.max() < 1.0


@pytest.mark.parametrize(("kind", "name"), [("qwen2", "Fast_dLLM_Qwen"), ("qwen3", "sdar")])
def test_weights_of_a_family_are_read_as_the_causal_model_they_came_from(kind, name, tmp_path):
    import json

    from transformers import AutoConfig, AutoModelForCausalLM

    from diffa.backbones.llama import Llama

    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[kind])).eval()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": name}))
    ours = Llama(checkpoint=str(tmp_path)).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        hidden = ours(ours.embed(tokens), tokens, AttentionContext())
        assert torch.allclose(ours.head(hidden), theirs(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdar", "llada2", "fastdllm2"])
def test_lora_and_gradient_checkpointing_work_as_for_other_backbones(kind):
    model = KINDS[kind](lora={"rank": 2}, gradient_checkpointing=True).train()
    embeds = torch.randn(2, 9, model.width, requires_grad=True)
    positions = torch.arange(9).expand(2, -1)
    model(embeds, positions, AttentionContext()).square().sum().backward()
    pairs = dict(model.lora.named_parameters())
    assert len(pairs) >= 2 * 2 * 3
    assert all(value.grad is not None for value in pairs.values())
