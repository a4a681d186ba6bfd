"""LLaDA and Llama: parity with other implementations, layouts, LoRA, checkpointing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffa
from diffa.backbones.llada import LLaDA
from diffa.backbones.llama import Llama
from diffa.backbones.transformer import rotary_embedding, rotate, swiglu
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import CheckpointError, SpecError

LLADA: dict[str, Any] = {
    "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 40,
    "vocab_size": 60, "embedding_size": 64, "max_sequence_length": 128, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "eos_token_id": 50, "pad_token_id": 50, "mask_token_id": 55,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "vocab_size": 64, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "eos_token_id": [49, 50], "bos_token_id": 1,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def run(
    backbone: Any, tokens: torch.Tensor, context: AttentionContext | None = None
) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        hidden = backbone(backbone.embed(tokens), positions, context or AttentionContext())
        return backbone.head(hidden)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(3))


def hf_llama(folder: Path, rope: dict[str, Any], tied: bool) -> Any:
    """A random Llama of transformers, written as a checkpoint folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(**LLAMA, rope_parameters=rope, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # norms too, so that none is one by luck
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("rope", [PLAIN, SCALED], ids=["plain", "llama3"])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_equals_transformers(tmp_path: Path, rope: dict[str, Any], tied: bool) -> None:
    theirs = hf_llama(tmp_path, rope, tied)
    ours = Llama(checkpoint=str(tmp_path)).eval()
    tokens = drawn(2, 40)
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(run(ours, tokens), expected, atol=2e-5, rtol=1e-4)
    assert ours.vocab == (64, 50, 50, None)


def test_llada_is_the_same_transformer_seeing_everything(tmp_path: Path) -> None:
    theirs = hf_llama(tmp_path / "llama", {**PLAIN, "rope_theta": 500000.0}, False)
    folder = write_llada(tmp_path / "llada", theirs.state_dict())
    tokens = drawn(2, 20)
    with torch.no_grad():
        everything = torch.zeros(2, 1, 20, 20)
        expected = theirs(tokens, attention_mask=everything).logits
    torch.testing.assert_close(
        run(LLaDA(checkpoint=str(folder)).eval(), tokens), expected, atol=2e-5, rtol=1e-4
    )


def write_llada(folder: Path, llama: dict[str, torch.Tensor]) -> Path:
    """Llama weights under LLaDA's published names."""
    from diffa.backbones.llama import rename_llama_keys

    folder.mkdir()
    state = {f"model.transformer.{k}": v.clone() for k, v in rename_llama_keys(llama).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLADA))
    return folder


@pytest.mark.parametrize("form", ["sharded", "pickle", "tied"])
def test_other_forms_of_the_published_layout_load(tmp_path: Path, form: str) -> None:
    source = LLaDA(config={**LLADA, "weight_tying": form == "tied"}, seed=1).eval()
    state = {f"model.transformer.{k}": v for k, v in source.transformer.state_dict().items()}
    if form == "tied":
        del state["model.transformer.ff_out.weight"]
    config = {**LLADA, "weight_tying": form == "tied"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if form == "pickle":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "tied":
        save_file(state, tmp_path / "model.safetensors")
    else:
        halves = [dict(list(state.items())[i::2]) for i in range(2)]
        index = {}
        for number, half in enumerate(halves):
            file = f"model-0000{number + 1}-of-00002.safetensors"
            save_file(half, tmp_path / file)
            index.update(dict.fromkeys(half, file))
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = LLaDA(checkpoint=str(tmp_path)).eval()
    tokens = drawn(1, 9)
    assert torch.equal(run(loaded, tokens), run(source, tokens))
    if form == "tied":
        assert loaded.head.weight is loaded.transformer.wte.weight


def test_the_future_is_seen_by_llada_and_not_by_llama() -> None:
    tokens = drawn(1, 12)
    changed = tokens.clone()
    changed[0, 8] = 7
    for backbone, causal in ((LLaDA(config=LLADA), False), (Llama(config=LLAMA), True)):
        before, after = run(backbone.eval(), tokens), run(backbone.eval(), changed)
        assert torch.equal(before[:, :8], after[:, :8]) is causal


def test_padding_does_not_leak() -> None:
    backbone = LLaDA(config=LLADA).eval()
    tokens = drawn(2, 10)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 6:] = False
    alone = run(backbone, tokens[1:, :6])
    batch = run(backbone, tokens, AttentionContext(valid=valid))
    torch.testing.assert_close(batch[1, :6], alone[0], atol=1e-5, rtol=1e-5)


def test_the_gate_is_the_same_with_gradients_and_in_place() -> None:
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    expected, kept = swiglu(gate, up), up.clone()
    with torch.no_grad():
        assert torch.equal(swiglu(gate.clone(), up), expected) and torch.equal(up, kept)
    leaf = gate.clone().requires_grad_()
    swiglu(leaf, up).sum().backward()
    assert torch.equal(leaf.detach(), gate) and leaf.grad is not None


def test_rotated_keys_meet_by_distance_alone() -> None:
    config = LLaDA(config=LLADA).transformer.config
    states = torch.randn(1, 6, 2, config.head_dim, dtype=torch.float64)
    near, far = (rotary_embedding(torch.arange(at, at + 6)[None], config) for at in (0, 40))
    scores = [
        torch.einsum("bkhd,bshd->bhks", rotate(states, cos_sin), rotate(states, cos_sin))
        for cos_sin in (near, far)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(states, near)[:, 0], states[:, 0])
    plain = torch.einsum("bkhd,bshd->bhks", states, states)
    assert not torch.allclose(scores[0], plain, rtol=1e-2), "nothing was rotated"


@pytest.mark.parametrize("causal", [False, True])
def test_checkpointing_changes_no_gradient(causal: bool) -> None:
    made = [
        (
            Llama(config=LLAMA, gradient_checkpointing=on)
            if causal
            else LLaDA(config=LLADA, gradient_checkpointing=on)
        )
        for on in (False, True)
    ]
    tokens = drawn(2, 11)
    positions = torch.arange(11).expand(2, 11)
    gradients = []
    for backbone in made:
        backbone.train()
        hidden = backbone(backbone.embed(tokens), positions, AttentionContext())
        backbone.head(hidden).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def lora_folder(folder: Path, module: str = "blocks.1.q_proj", out: int = 32) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(2)
    prefix = f"llm_model.base_model.model.model.transformer.{module}"
    state = {
        f"{prefix}.lora_A.default.weight": torch.randn(8, 32, generator=drawn),
        f"{prefix}.lora_B.default.weight": torch.randn(out, 8, generator=drawn),
        "semantic_connector.layernorm.weight": torch.ones(32),
    }
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    return {"checkpoint": str(folder), "merge": True}


def test_lora_is_merged_with_alpha_over_rank(tmp_path: Path) -> None:
    lora = lora_folder(tmp_path)
    plain, merged = LLaDA(config=LLADA), LLaDA(config=LLADA, lora=lora)
    state = torch.load(tmp_path / "pytorch_model.bin")
    down, up = (v for k, v in state.items() if "lora" in k)
    change = merged.transformer.blocks[1].q_proj.weight - plain.transformer.blocks[1].q_proj.weight
    torch.testing.assert_close(change.detach(), 2 * up @ down, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        merged.transformer.blocks[0].q_proj.weight, plain.transformer.blocks[0].q_proj.weight
    )


@pytest.mark.parametrize(
    ("module", "out", "told"),
    [("blocks.9.q_proj", 32, "fits no weight"), ("blocks.1.q_proj", 31, "fits no weight")],
)
def test_lora_that_fits_nothing_is_refused(
    tmp_path: Path, module: str, out: int, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        LLaDA(config=LLADA, lora=lora_folder(tmp_path, module, out))


@pytest.mark.parametrize(
    ("lora", "told"),
    [({"chekpoint": "x"}, "did you mean 'checkpoint'"), ({"merge": True}, r"lora\.checkpoint")],
)
def test_lora_options_are_checked(lora: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        LLaDA(config=LLADA, lora=lora)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"block_type": "sequential"}, "block_type is 'sequential'"),
        ({"n_heads": 5}, "do not divide"),
        ({"mask_token_id": None}, "mask_token_id"),
    ],
)
def test_another_architecture_is_refused(change: dict[str, Any], told: str) -> None:
    config = {k: v for k, v in {**LLADA, **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=told):
        LLaDA(config=config)


def test_a_checkpoint_with_missing_and_extra_keys_is_refused(tmp_path: Path) -> None:
    source = LLaDA(config=LLADA)
    state = {f"model.transformer.{k}": v for k, v in source.transformer.state_dict().items()}
    state["model.transformer.blocks.0.spare"] = state.pop("model.transformer.ln_f.weight")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLADA))
    with pytest.raises(CheckpointError, match=r"missing: ln_f.weight.*blocks\.0\.spare"):
        LLaDA(checkpoint=str(tmp_path))


def test_neither_checkpoint_nor_config_is_refused() -> None:
    with pytest.raises(SpecError, match="either checkpoint"):
        LLaDA()


def test_golden_logits_in_float64_agree(golden1: Any) -> None:
    model, expected = golden1
    folder = Path(__file__).parents[1] / "golden" / "diffa1-tiny"
    wide = LLaDA(checkpoint=str(folder / "llada")).double().eval()
    logits = run(wide, expected["llada.tokens"])
    assert logits.dtype == torch.float64
    assert (logits - expected["llada.logits"]).abs().max() < 1e-3
    assert set(load_file(folder / "llada" / "model.safetensors"))
    assert isinstance(model, diffa.Model)
