"""Saving and loading: exact, strict, atomic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import golden_spec
from helpers.leftovers import leftover
from safetensors import safe_open
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
    with pytest.raises(CheckpointError, match=r"did not write \(thesis\.txt\)"):
        diffa.save(diffa.build(small()), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("extra", ["thesis.txt", ".hidden", "model"])
def test_a_saved_model_with_other_files_beside_is_refused(tmp_path: Path, extra: str) -> None:
    model = diffa.build(small())
    diffa.save(model, tmp_path / "m")
    (tmp_path / "m" / extra).mkdir()
    with pytest.raises(CheckpointError, match=extra):
        diffa.save(model, tmp_path / "m")
    assert (tmp_path / "m" / extra).is_dir()


@pytest.mark.parametrize("weights", [None, b"", b"not safetensors", "foreign"])
def test_a_spec_without_weights_that_save_wrote_is_refused(tmp_path: Path, weights: Any) -> None:
    (tmp_path / "spec.json").write_text("{}")
    if weights == "foreign":
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    elif weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"did not write \(.*spec\.json"):
        diffa.save(diffa.build(small()), tmp_path)
    assert (tmp_path / "spec.json").read_text() == "{}"


def test_a_file_and_the_working_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffa.build(small())
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is no folder"):
        diffa.save(model, tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is the working directory"):
        diffa.save(model, ".")


def test_equal_models_are_saved_as_equal_bytes(tmp_path: Path) -> None:
    model = diffa.build(small())
    for name in ("a", "b", "c", "d"):
        diffa.save(model, tmp_path / name)
    for file in ("spec.json", "model.safetensors"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abcd"}) == 1


def test_copies_left_by_killed_saves_are_removed_by_the_next(tmp_path: Path) -> None:
    for kind in ("part", "old"):
        leftover(tmp_path / "m", kind).mkdir()
    diffa.save(diffa.build(small()), tmp_path / "m")
    diffa.save(diffa.build(small()), tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(float("nan")), "is not finite"),
        (lambda t: t.index_fill_(0, torch.tensor([0]), float("inf")), "is not finite"),
        (lambda t: t > 0, "is bool: weights are floating-point"),
        (lambda t: t.to(torch.uint8), "is uint8"),
        (lambda t: t[:1].clone(), "has shape"),
    ],
)
def test_unusable_weights_are_named(tmp_path: Path, change: Any, message: str) -> None:
    diffa.save(diffa.build(small()), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    key = "adapters.semantic.layernorm.weight"
    save_file(tensors | {key: change(tensors[key])}, file, notes)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{key} {message}"):
        diffa.load(tmp_path / "m")


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
