"""Block-causal backbones repeat what SDAR, LLaDA2 and Fast-dLLM v2 compute."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import GOLDEN
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import golden_block

FOLDERS = ("sdar-tiny", "llada2-tiny", "fastdllm2-tiny")


@pytest.mark.parametrize("name", FOLDERS)
def test_every_reference_number_is_met(name):
    total, faults = golden_block.run(GOLDEN / name)
    assert total >= 25
    assert faults == []


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_numbers_are_noticed(name, tmp_path):
    """Weights, tokens, forward counts and names that are off make the check fail."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    expected = json.loads((folder / "expected.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    kept = {"full0", "loss0"}
    answer = next(n for n in sorted(tensors) if n.endswith(".answer"))
    case = answer.removesuffix(".answer")
    names = [n for n in tensors if n.split(".")[0] in {*kept, case.split(".")[0]}]
    few = {n: tensors[n] for n in names}
    few["unknown0.what"] = tensors[answer].clone()
    few["full0.logits"] = few["full0.logits"] + 0.01
    few["loss0.losses"] = few["loss0.losses"] * 1.01
    few[answer] = few[answer] ^ 1
    save_file(few, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(expected))
    _, faults = golden_block.run(folder)
    broken = {fault.partition(":")[0] for fault in faults}
    assert {"unknown0.what", "full0.logits", "loss0.losses", answer} <= broken
