"""Two processes, with copies (DDP) or shards (FSDP2), learn what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.toy import QUIET
from safetensors.torch import load_file

from diffa.trainers import train
from diffa.trainers.progress import read_log

SCRIPT = Path(__file__).parents[1] / "helpers" / "distributed.py"
STAGES = ("1-align", "2-all")


def recipe(world: Path, batch_size: int, *, lora: bool = False) -> dict[str, Any]:
    """Adapters first, then adapters and backbone, or adapters and LoRA: some frozen, all split."""
    spec = toy.spec(world / "tokenizer")
    spec["encoder"] = {"name": "tiny", "window_seconds": 1.0, "width": 16, "layers": 2, "heads": 2}
    stage = {
        "data": [{"path": str(world / "train.json")}],
        "max_steps": 3,
        "batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "group_by_length": False,
        "save_steps": 2,
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
    }
    if lora:
        spec["backbone"]["lora"] = {"rank": 4, "dropout": 0.0}
        stages = [stage | {"name": "tune", "train": ["adapters", "backbone.lora"]}]
        return {"spec": spec, "save_total_limit": 9, "stages": stages}
    stages = [
        stage | {"name": "align", "train": ["adapters"]},
        stage | {"name": "all", "train": ["adapters", "backbone"]},
    ]
    return {"spec": spec, "save_total_limit": 9, "stages": stages}


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns from the same rows."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(recipe(world, batch_size=4), out=out, console=QUIET, device="cpu")
    return out


def launch(configuration: str, made: dict[str, Any], out: Path, *resume: str) -> str:
    """Train in two processes; return what they printed."""
    file = out.parent / "recipe.json"
    file.write_text(json.dumps(made))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(port), str(SCRIPT), configuration, str(file), str(out)]
    done = subprocess.run([*command, *resume], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def agree(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.allclose(one[key], two[key], rtol=1e-4, atol=2e-5) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(
    configuration: str, world: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    printed = launch(configuration, recipe(world, batch_size=2), out)
    split = configuration == "fsdp2"  # after every stage that was trained
    assert printed.count(f"split: [{split}, {split}]") == 2
    for stage in STAGES:
        one, two = (read_log(place / stage / "log.jsonl") for place in (alone, out))
        losses = [[row["loss"] for row in log if "loss" in row] for log in (one, two)]
        assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert agree(weights(alone / stage), weights(out / stage))
        assert agree(
            weights(alone / stage / "checkpoint-2"),
            weights(out / stage / "checkpoint-2"),
        )
    whole = [load_file(place / "model" / "model.safetensors") for place in (alone, out)]
    assert agree(*whole)
    (out / "2-all" / "stage.json").unlink()  # as if it had died behind its checkpoint
    launch(configuration, recipe(world, batch_size=2), out, "resume")
    assert agree(weights(alone / "2-all"), weights(out / "2-all"))
    rows = [row for row in read_log(out / "2-all" / "log.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_lora_that_is_split_learns_what_it_does_whole(world: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "two", tmp_path / "one"
    train(recipe(world, batch_size=4, lora=True), out=whole, console=QUIET, device="cpu")
    printed = launch("fsdp2", recipe(world, batch_size=2, lora=True), out)
    assert printed.count("split: [True]") == 2
    learned = weights(whole / "1-tune")
    assert any(".lora_A." in name for name in learned)
    assert agree(learned, weights(out / "1-tune"))
