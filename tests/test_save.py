"""Saving and loading: exact, strict, atomic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import golden_spec
from safetensors.torch import load_file, save_file

import diffa
from diffa.errors import CheckpointError


def small(**parts: Any) -> dict[str, Any]:
    return {
        "encoder": {"name": "tiny", "width": 32, "heads": 2},
        "adapters": {
            "acoustic": {"name": "qformer", "num_queries": 4, "intermediate_size": 32},
            "semantic": "conv",
        },
        "backbone": {
            "name": "llada",
            "config": {
                "d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 48,
                "vocab_size": 50, "eos_token_id": 40, "mask_token_id": 49,
                "weight_tying": True,
            },
        },
        "sampler": {"name": "blockwise", "block_length": 4},
        **parts,
    }  # fmt: skip


WAVE = torch.sin(torch.arange(9000) / 7.0) * 0.3


def test_a_saved_model_loads_and_says_the_same(tmp_path: Path) -> None:
    model = diffa.build(small())
    diffa.save(model, tmp_path / "m")
    again = diffa.load(tmp_path / "m")
    assert again.spec == model.spec
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    prompt = torch.tensor([1, 2, 3])
    made = [m.generate(prompt, WAVE, max_tokens=6).tokens[0] for m in (model, again)]
    assert torch.equal(*made)


def test_only_what_no_checkpoint_pins_is_written(tmp_path: Path) -> None:
    model = diffa.build(golden_spec("diffa1-tiny", train=["adapters.semantic"]))
    with torch.no_grad():
        next(model.adapters["semantic"].parameters()).add_(1)
    diffa.save(model, tmp_path / "m")
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert {key.split(".")[1] for key in written} == {"semantic"}
    again = diffa.load(tmp_path / "m")
    theirs = next(again.adapters["semantic"].parameters())
    assert torch.equal(theirs, next(model.adapters["semantic"].parameters()))


def test_a_missing_and_an_extra_weight_are_named(tmp_path: Path) -> None:
    diffa.save(diffa.build(small()), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["adapters.semantic.extra"] = tensors.pop("adapters.semantic.layernorm.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing: .*layernorm\.weight.*unexpected: .*extra"):
        diffa.load(tmp_path / "m")


def test_a_damaged_file_is_a_clear_error(tmp_path: Path) -> None:
    diffa.save(diffa.build(small()), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        diffa.load(tmp_path / "m")


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no saved model: choose another place"):
        diffa.save(diffa.build(small()), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffa.build(small())
    diffa.save(model, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*nothing was changed"):
        diffa.save(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_saving_again_replaces_the_folder_whole(tmp_path: Path) -> None:
    model = diffa.build(small())
    diffa.save(model, tmp_path / "m")
    diffa.save(diffa.swap(model, sampler={"name": "blockwise", "threshold": 0.9}), tmp_path / "m")
    spec = json.loads((tmp_path / "m" / "spec.json").read_text())
    assert spec["sampler"]["threshold"] == 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_is_no_saved_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no spec\.json"):
        diffa.load(tmp_path)
