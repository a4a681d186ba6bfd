"""Modules that are imported under another default device have their tensors on the CPU."""

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from diffa.runtime.imports import imports_on_cpu

TESTS = Path(__file__).parents[1]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with a tensor, which is not imported yet."""
    (tmp_path / "tensor_at_import.py").write_text("import torch\nVALUE = torch.zeros(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "tensor_at_import"
    sys.modules.pop("tensor_at_import", None)


def test_tensors_of_imported_modules_are_on_the_cpu(module):
    with torch.device("meta"), imports_on_cpu():
        assert importlib.import_module(module).VALUE.device.type == "cpu"
        assert torch.zeros(2).is_meta


def test_without_it_they_are_on_the_default_device(module):
    with torch.device("meta"):
        assert importlib.import_module(module).VALUE.is_meta


def test_the_finders_are_restored_also_after_an_error():
    finders = [*sys.meta_path]
    with pytest.raises(ModuleNotFoundError), imports_on_cpu():
        importlib.import_module("no_such_module_anywhere")
    assert sys.meta_path == finders


def test_several_threads_can_import_at_once(module):
    barrier = threading.Barrier(2)
    devices = []

    def run():
        with torch.device("meta"), imports_on_cpu():
            barrier.wait(10)
            devices.append(importlib.import_module(module).VALUE.device.type)
            barrier.wait(10)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert devices == ["cpu", "cpu"]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import json, warnings
warnings.simplefilter("ignore")
import torch
import diffa
from test_combinations import ADAPTERS, BACKBONES, ENCODERS, spec

encoders = {encoders!r} or [name for name in ENCODERS if name != "whisper"]
pairs = [(name, "pool", "llada") for name in encoders]
if not {encoders!r}:
    pairs += [("tiny", name, "llada") for name in ADAPTERS]
    pairs += [("tiny", "pool", name) for name in BACKBONES]
for pair in pairs:
    diffa.build(spec(*pair), device="meta")
failures = {{}}
for pair in pairs:
    try:
        model = diffa.build(spec(*pair))
        wave = 0.1 * torch.randn(model.encoder.sample_rate)
        model.listen(wave)
        model.generate(torch.tensor([1, 2]), wave, audio_at=1, max_tokens=2)
    except Exception as error:
        failures["/".join(pair)] = repr(error)
print(json.dumps(failures))
"""


def failures_after_a_dry_run(encoders=()):
    """Return what fails in a new process that builds on the meta device first. (): all parts."""
    code = SCRIPT.format(tests=str(TESTS), encoders=list(encoders))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_an_encoder_runs_after_a_dry_run_of_another():
    """Whisper imports torchaudio's Kaldi module, whose EPSILON timm's front end uses."""
    assert failures_after_a_dry_run(["tiny", "timm-convolutions"]) == {}


@pytest.mark.slow
def test_every_part_runs_after_a_dry_run_of_all_parts():
    assert failures_after_a_dry_run() == {}
