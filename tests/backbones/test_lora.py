"""LoRA on any backbone: live, folded in, trained, saved alone, read from DIFFA-2's keys."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN
from helpers.golden import golden_spec
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import diffa
from diffa.backbones import lora
from diffa.backbones.lora import apply_lora, lora_layers, lora_module, merge_lora_pairs
from diffa.errors import CheckpointError, SpecError
from diffa.trainers.trainable import eval_frozen_parts, set_trainable

LLADA = {
    "d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": 50,
    "eos_token_id": 40, "mask_token_id": 49,
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48,
    "vocab_size": 50, "eos_token_id": 40,
}  # fmt: skip
BACKBONES: dict[str, dict[str, Any]] = {
    "llada": {"name": "llada", "config": LLADA},
    "dream": {"name": "dream", "config": {**LLAMA, "mask_token_id": 49}},
    "llama": {"name": "llama", "config": LLAMA},
    "causal": {"name": "causal", "config": {**LLAMA, "model_type": "llama"}},
}
WAVE = torch.sin(torch.arange(6000) / 7.0) * 0.3
PROMPT = torch.tensor([1, 2, 3, 4])


def spec(backbone: str = "llada", **lora: Any) -> dict[str, Any]:
    return {
        "encoder": {"name": "tiny", "width": 16, "heads": 2, "layers": 2, "window_seconds": 1.0},
        "adapters": {"semantic": "conv"},
        "backbone": {**BACKBONES[backbone], "lora": lora or {"rank": 4}},
        "train": ["adapters", "backbone.lora"],
    }


@torch.no_grad()
def said(model: Any) -> torch.Tensor:
    return model.logits(model.backbone.embed(PROMPT[None]))


@torch.no_grad()
def stir(model: Any) -> None:
    """Give fresh pairs something to say."""
    drawn = torch.Generator().manual_seed(1)
    for weight in model.backbone.lora.parameters():
        weight.copy_(0.3 * torch.randn(weight.shape, generator=drawn))


@pytest.mark.parametrize("name", BACKBONES)
def test_new_pairs_change_nothing_until_they_learn(name: str) -> None:
    plain = diffa.build({**spec(name), "backbone": BACKBONES[name], "train": ["adapters"]})
    model = diffa.build(spec(name))
    assert torch.equal(said(model), said(plain))
    learning = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    targets = {key.split(".lora_")[0].rpartition(".")[2] for key in learning}
    own = {"q_proj", "k_proj", "v_proj", "up_proj"}
    assert targets == own | (
        {"gate_proj", "o_proj", "down_proj"} if name == "causal" else {"ff_proj"}
    )
    stir(model)
    assert not torch.allclose(said(model), said(plain), atol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_pairs_are_saved_with_the_model_and_folded_in_on_request(name: str, tmp_path: Path) -> None:
    model = diffa.build(spec(name, rank=4, alpha=8.0))
    stir(model)
    diffa.save(model, tmp_path / "m")
    live = diffa.load(tmp_path / "m")
    assert torch.equal(said(live), said(model))
    folded = diffa.load(tmp_path / "m", merge=True)
    assert not list(lora_layers(folded.backbone))
    assert torch.allclose(said(folded), said(model), atol=1e-4)
    diffa.save(folded, tmp_path / "folded")
    assert torch.equal(said(diffa.load(tmp_path / "folded")), said(folded))


def adapted(**lora: Any) -> Any:
    """A linear layer with a pair, and something to say for it."""
    body = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    apply_lora(body, {"target_modules": ["0"], **lora})
    ((_, layer),) = lora_layers(body)
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
    return layer


def test_a_pair_counts_alpha_over_rank_times() -> None:
    layer, x = adapted(rank=4, alpha=8.0).eval(), torch.randn(3, 6)
    change = layer.lora_B["default"](layer.lora_A["default"](x))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 8 / 4 * change)


def test_dropout_is_in_training_before_the_pairs_alone() -> None:
    layer, x = adapted(rank=4, dropout=0.5), torch.ones(256, 6)
    assert layer.lora_dropout["default"].p == 0.5
    assert layer.train()(x).unique(dim=0).shape[0] > 8  # rows are alike until inputs are dropped
    rows = layer.eval()(x)  # up to rounding: some processors' products differ by the row
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    layer.lora_dropout["default"].p = 0.0
    assert torch.equal(layer.train()(x), rows)  # to the bit: nothing was dropped
    none = adapted(rank=4, dropout=0.0)
    assert torch.equal(none.train()(x), none.eval()(x))


def test_pairs_are_drawn_from_their_own_seed() -> None:
    before = torch.get_rng_state()
    torch.nn.Linear(6, 5, bias=False)  # as the layer itself draws
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    one, same, other = adapted(seed=1), adapted(seed=1), adapted(seed=2)
    torch.set_rng_state(before)
    adapted(seed=1)
    assert torch.equal(torch.get_rng_state(), after)
    one, same, other = (layer.lora_A["default"].weight for layer in (one, same, other))
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=1e-2)
    wide = adapted(rank=64).lora_A["default"].weight.detach()
    assert 0.95 * 6**-0.5 < float(wide.abs().max()) <= 6**-0.5  # by what it reads, as LoRA begins


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("layer", "shape"), [(torch.nn.Linear, (6, 5)), (Conv1D, (5, 6)), (Conv1D, (6, 6))]
)
def test_pairs_are_folded_into_either_kind_of_layer(layer: Any, shape: Any, tmp_path: Path) -> None:
    """GPT-2's layers hold their weights the other way round."""
    torch.manual_seed(0)
    body, x = torch.nn.Sequential(layer(*shape)), torch.randn(3, 6)
    plain = copy.deepcopy(body)
    apply_lora(body, {"rank": 2, "alpha": 8.0, "target_modules": ["0"]})
    torch.nn.init.normal_(body[0].lora_B["default"].weight)
    due = body.eval()(x)
    pairs = {f"backbone.lora.{k}": v for k, v in lora_module(body).state_dict().items()}
    save_file(pairs, tmp_path / "model.safetensors")
    for merge in (False, True):
        read = copy.deepcopy(plain)
        apply_lora(read, {"checkpoint": str(tmp_path), "alpha": 8.0, "merge": merge})
        torch.testing.assert_close(read.eval()(x), due)
    assert merge_lora_pairs(body) == 1 and not list(lora_layers(body))
    torch.testing.assert_close(body(x), due)


def test_pairs_that_are_no_pairs_or_fit_no_weight_are_told(tmp_path: Path) -> None:
    down, up = torch.zeros(2, 6), torch.zeros(5, 2)
    for halves, told in (
        ({"lora_A": down}, "pair of '0' is not whole"),
        ({"lora_A": down, "lora_B": up[:, :1]}, "pair of '0' is not whole"),
        ({"lora_A": down, "bias": up}, "is not part of a LoRA pair"),
        ({"lora_A": down[:, 1:], "lora_B": up}, "pair of '0' fits no weight"),
        ({"lora_A": down, "lora_B": up[1:]}, "pair of '0' fits no weight"),
    ):
        held = {f"backbone.lora.0.{half}.default.weight": v for half, v in halves.items()}
        save_file({k: v.clone() for k, v in held.items()}, tmp_path / "model.safetensors")
        for merge in (False, True):
            body = torch.nn.Sequential(torch.nn.Linear(6, 5))
            with pytest.raises(CheckpointError, match=told):
                apply_lora(body, {"checkpoint": str(tmp_path), "merge": merge})


def test_pairs_that_have_learned_count_in_a_stage_where_they_do_not_learn() -> None:
    model = diffa.build(spec(rank=4, dropout=0.5))
    stir(model)
    due = said(model)
    set_trainable(model, ["adapters"])
    eval_frozen_parts(model.train())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert torch.equal(said(model), due)  # neither asleep nor dropped out
    set_trainable(model, ["backbone.lora"])
    eval_frozen_parts(model.train())
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    assert not torch.allclose(said(model), due, atol=1e-3)


def golden2(**lora: Any) -> Any:
    made = golden_spec("diffa2-tiny", train=["adapters", "backbone.lora"])
    made["backbone"]["lora"] |= lora
    return made


def test_pairs_are_saved_alone_where_a_checkpoint_holds_the_backbone(tmp_path: Path) -> None:
    model = diffa.build(golden2(merge=False))
    with torch.no_grad():
        next(model.backbone.lora.parameters()).add_(0.1)
    diffa.save(model, tmp_path / "m")
    written = load_file(tmp_path / "m" / "model.safetensors")
    pairs = {k: v for k, v in written.items() if k.startswith("backbone.")}
    assert set(pairs) == {f"backbone.lora.{k}" for k in model.backbone.lora.state_dict()}
    assert "backbone.lora.blocks.0.q_proj.lora_A.default.weight" in pairs
    assert sum(v.numel() for v in pairs.values()) < 0.2 * sum(
        p.numel() for p in model.backbone.parameters()
    )
    live, folded = diffa.load(tmp_path / "m"), diffa.load(tmp_path / "m", merge=True)
    assert torch.equal(said(live), said(model))
    assert torch.allclose(said(folded), said(model), atol=1e-3)
    # what is folded in is pinned by the folder that holds the pairs
    diffa.save(folded, tmp_path / "folded")
    assert not any("backbone" in k for k in load_file(tmp_path / "folded" / "model.safetensors"))
    assert torch.equal(said(diffa.load(tmp_path / "folded")), said(folded))


def test_new_pairs_are_saved_with_the_rank_that_they_have(tmp_path: Path) -> None:
    made = golden2()
    made["backbone"]["lora"] = {"rank": 3, "target_modules": ["attn_out", "ff_out"]}
    model = diffa.build(made)
    stir(model)
    diffa.save(model, tmp_path / "m")
    assert torch.equal(said(diffa.load(tmp_path / "m")), said(model))
    names = [name for name, _ in lora_layers(model.backbone)]
    assert "transformer.blocks.0.ff_out" in names
    assert "transformer.ff_out" not in names  # the head stays


def test_pairs_that_go_with_a_swapped_backbone_are_not_to_learn() -> None:
    model = diffa.build(spec())
    assert diffa.swap(model, backbone=BACKBONES["llada"]).spec.data["train"] == ["adapters"]
    kept = diffa.swap(model, sampler="blockwise").spec.data["train"]
    assert kept == ["adapters", "backbone.lora"]


def test_only_what_reads_off_the_vocabulary_is_a_head() -> None:
    body = torch.nn.ModuleDict(
        {
            "words": torch.nn.Embedding(100, 8),
            "places": torch.nn.Embedding(16, 8),
            "layer": torch.nn.Linear(8, 16),  # as wide as there are places
            "head": torch.nn.Linear(8, 100),
        }
    )
    apply_lora(body, {"rank": 2})
    assert [name for name, _ in lora_layers(body)] == ["layer"]


def trained_pairs(folder: Path, **lora: Any) -> Path:
    """A saved model with pairs that have something to say."""
    made = golden2()
    made["backbone"]["lora"] = lora
    model = diffa.build(made)
    stir(model)
    diffa.save(model, folder)
    return folder


def test_pairs_that_were_read_are_saved_with_the_layers_that_they_have(tmp_path: Path) -> None:
    first = trained_pairs(tmp_path / "a", target_modules=["q_proj"])
    made = golden2()
    made["backbone"]["lora"] = {"checkpoint": str(first), "merge": False}
    model = diffa.build(made)
    diffa.save(model, tmp_path / "b")
    assert torch.equal(said(diffa.load(tmp_path / "b")), said(model))


def test_pairs_that_did_not_learn_are_merged_from_where_they_are(tmp_path: Path) -> None:
    made = golden2()
    pairs = trained_pairs(tmp_path / "a", rank=4)
    made["backbone"]["lora"] = {"checkpoint": str(pairs), "merge": False}
    model = diffa.build({**made, "train": ["adapters"]})
    diffa.save(model, tmp_path / "c")
    folded = diffa.load(tmp_path / "c", merge=True)
    diffa.save(folded, tmp_path / "d")
    assert torch.equal(said(diffa.load(tmp_path / "d")), said(folded))
    assert torch.allclose(said(folded), said(model), atol=1e-3)


def test_a_backbone_that_is_swapped_in_learns_pairs_with_all_their_digits() -> None:
    model = diffa.build(spec(), dtype="bfloat16")
    swapped = diffa.swap(model, backbone=spec(rank=2)["backbone"])
    assert swapped.dtype == torch.bfloat16
    assert {p.dtype for p in swapped.backbone.lora.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"rnk": 4}, "did you mean 'rank'"),
        ({"rank": 0}, r"lora\.rank must be at least 1"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"target_modules": "q_proj"}, "a list of layer names"),
        ({"dropout": 1.0}, r"lora\.dropout must lie in"),
        ({"merge": True}, r"lora\.checkpoint: needed to merge"),
    ],
)
def test_options_are_checked(lora: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        diffa.build(spec(**lora))


def test_a_rank_that_the_checkpoint_does_not_have_is_told() -> None:
    with pytest.raises(SpecError, match=r"lora.rank is 4, but .* holds rank 8"):
        diffa.build(golden2(rank=4, merge=False))
    with pytest.raises(CheckpointError, match="holds no LoRA pairs"):
        diffa.build(golden2(checkpoint=str(GOLDEN / "diffa1-tiny" / "diffa")))


def test_what_is_folded_in_cannot_be_trained() -> None:
    with pytest.raises(SpecError, match=r"backbone.lora is folded in"):
        diffa.build(golden2(merge=True))
    with pytest.raises(SpecError, match=r"unknown part 'backbone.lora'"):
        diffa.build({**spec(), "backbone": BACKBONES["llada"]})


def test_the_published_repository_holds_stage_1_beside_stage_4(tmp_path: Path) -> None:
    root = tmp_path / "DIFFA-2"
    shutil.copytree(GOLDEN / "diffa2-tiny" / "diffa", root)
    shutil.copytree(GOLDEN / "diffa2-tiny" / "diffa", root / "stage1")
    values = load_file(GOLDEN / "diffa2-tiny" / "expected.safetensors")
    wave = values["clip1.waveform"].float() / 32768
    for preset, expected in (("diffa-2-asr", "prompt"), ("diffa-2-tune", "acoustic")):
        text = (diffa.Spec.read(preset).to_json()).replace("zhoujiaming777/DIFFA-2", str(root))
        made = json.loads(text)
        made["encoder"]["checkpoint"] = str(GOLDEN / "diffa2-tiny" / "whisper")
        made["backbone"]["checkpoint"] = str(GOLDEN / "diffa2-tiny" / "llada")
        model = diffa.build(made)
        assert bool(list(lora_layers(model.backbone))) == (preset == "diffa-2-tune")
        with torch.no_grad():
            heard = model.listen(wave).values
        due = values[f"clip1.embeds.{expected}_semantic"]
        assert heard.shape == due.shape and (heard - due).abs().max() < 1e-5


def test_both_system_prompts_are_at_hand() -> None:
    asked, trained = (
        diffa.Spec.read(n).data["prompt"]["system"] for n in ("diffa-2", "diffa-2-tune")
    )
    assert asked == "You are a helpful voice assistant."
    assert trained == (
        "You are a helpful voice assistant. Imagine you can hear the audio clips. Focus on the "
        "audios and respond directly to the prompts."
    )


def test_a_dry_build_counts_the_pairs() -> None:
    model = diffa.build(spec(rank=4), device="meta")
    own = sum(p.numel() for p in model.backbone.lora.parameters())
    assert own == 2 * 4 * (3 * (32 + 32) + 2 * (32 + 48))


def test_layers_as_wide_as_the_vocabulary_are_no_heads() -> None:
    body = nn.Module()
    body.wte = nn.Embedding(64, 64)
    body.blocks = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(64, 64),
                                                "up": nn.Linear(64, 96),
                                                "down": nn.Linear(96, 64)})])  # fmt: skip
    body.lm_head = nn.Linear(64, 64)
    assert lora._target_names(body, ()) == ["blocks.0.q_proj", "blocks.0.up", "blocks.0.down"]
    assert lora._target_names(body, ("q_proj",)) == ["blocks.0.q_proj"]
