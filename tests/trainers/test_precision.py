"""Training in bfloat16 learns what training in float32 does, in every kind of stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.toy import QUIET
from rich.console import Console
from safetensors.torch import load_file

from diffa.assembly import parse_device
from diffa.errors import SpecError
from diffa.runtime.precision import no_grad
from diffa.trainers import train
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.progress import read_log

KINDS: dict[str, dict[str, Any]] = {
    "adapters": {"train": ["adapters"]},
    "adapters-and-lora": {"train": ["adapters", "backbone.lora"]},
    "backbone": {"train": ["backbone"]},
    "encoder-and-adapters": {"train": ["encoder", "adapters"]},
    "causal": {"train": ["backbone"], "objective": "autoregressive"},
    "preferences": {
        "train": ["adapters", "backbone.lora"], "learner": "preferences", "data": "pairs.json",
        "objective": {"name": "vrpo", "samples": 4, "beta": 1.0},
    },
    "preferences-backbone": {
        "train": ["backbone"], "learner": "preferences", "data": "pairs.json",
        "objective": {"name": "vrpo", "samples": 4, "beta": 1.0},
    },
    "transcripts": {
        "train": ["adapters"],
        "learner": {"name": "nano-answers", "blank_token": "?", "ctc": {"semantic": 0.3}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_world(tmp_path_factory.mktemp("precision"), rejected="three four five")


def recipe(world: Path, precision: str, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    spec = toy.spec(world / "tokenizer")
    spec["encoder"] = {"name": "tiny", "window_seconds": 1.0, "width": 16, "layers": 2, "heads": 2}
    spec["adapters"] = {"acoustic": {"name": "qformer", "num_queries": 4}, **spec["adapters"]}
    if "backbone.lora" in options["train"]:
        spec["backbone"]["lora"] = {"rank": 4}
    if objective := options.pop("objective", None):
        spec["objective"] = objective
    if objective == "autoregressive":
        config = {
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64,
            "eos_token_id": 0, "pad_token_id": 0,
        }  # fmt: skip
        spec["backbone"] = {
            "name": "llama", "config": config, "tokenizer": str(world / "tokenizer"),
        }  # fmt: skip
        spec.pop("sampler", None)
    data = options.pop("data", "train.json")
    stage = {
        "name": "learn", "data": [{"path": str(world / data)}], "max_steps": 6, "batch_size": 4,
        "save_steps": 6, "logging_steps": 1, "optimizer": {"lr": 1e-2},
        "schedule": {"name": "constant"}, **options,
    }  # fmt: skip
    return {"spec": spec, "seed": 1, "precision": precision, "stages": [stage]}


def run(world: Path, out: Path, precision: str, options: dict[str, Any]) -> tuple[list[Any], Any]:
    made = recipe(world, precision, options)
    train(made, out=out, console=QUIET, device="cpu")
    log = [row for row in read_log(out / "1-learn" / "log.jsonl") if "loss" in row]
    return log, load_file(out / "1-learn" / "weights.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_follows_float32(kind: str, world: Path, tmp_path: Path) -> None:
    whole, whole_weights = run(world, tmp_path / "float32", "float32", KINDS[kind])
    half, half_weights = run(world, tmp_path / "bf16", "bf16", KINDS[kind])
    assert half_weights.keys() == whole_weights.keys()
    first = [row["loss"] for row in whole][:2], [row["loss"] for row in half][:2]
    assert first[1] == pytest.approx(first[0], rel=0.02)
    norms = [row["grad_norm"] for row in whole][:2], [row["grad_norm"] for row in half][:2]
    assert norms[1] == pytest.approx(norms[0], rel=0.1) and min(norms[0]) > 0
    means = [sum(row["loss"] for row in log) for log in (whole, half)]
    assert means[1] == pytest.approx(means[0], rel=0.02)
    for key, weight in half_weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, whole_weights[key]) is False or weight.numel() == 1, key


def test_weights_cast_without_gradients_do_not_serve_the_policy() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            layer(x)
        assert not layer(x).requires_grad  # why diffa's own no_grad exists
    with torch.autocast("cpu", torch.bfloat16):
        with no_grad():
            assert not layer(x).requires_grad
        out = layer(x)
        with no_grad():
            layer.weight.data = layer.weight.data + 1
            moved = layer(x)
    out.sum().backward()
    assert layer.weight.grad is not None and not torch.equal(out, moved)


def test_a_stage_in_which_nothing_has_a_gradient_stops(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffa.trainers.learners.preferences.no_grad", torch.no_grad)
    with pytest.raises(TrainingError, match="no trained weight has a gradient"):
        run(world, tmp_path, "bf16", KINDS["preferences"] | {"train": ["backbone.lora"]})


def test_weights_without_a_gradient_are_named_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffa.trainers.learners.preferences.no_grad", torch.no_grad)
    made = recipe(world, "bf16", KINDS["preferences"])
    train(made, out=tmp_path, console=Console(stderr=True, width=400), device="cpu")
    notes = capsys.readouterr().err
    assert notes.count("trained weights had no gradient in step 1: model.") == 1


def test_apples_gpus_are_refused_with_the_reason() -> None:
    for name in ("mps", torch.device("mps")):
        with pytest.raises(SpecError, match="no float64"):
            parse_device(name)
