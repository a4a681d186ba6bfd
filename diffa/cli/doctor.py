"""Check what works on this machine; a library that crashes is tried in its own process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from diffa.spec.registry import DISTRIBUTION

_TIMEOUT = 180  # seconds: a cold disk reads torch slowly
_TIMED_OUT = 1000  # an exit code that no process has

# One trial per library: the few lines of Python that diffa needs of it.
_TORCH = "import torch; assert (torch.ones(2) @ torch.ones(2)).item() == 2"
_TORCHAUDIO = (
    "import torch, torchaudio; torchaudio.functional.resample(torch.ones(1, 160), 16000, 8000)"
)
_TRANSFORMERS = (  # also fails with a broken torchaudio, which its audio utilities import
    "import numpy; from transformers import WhisperFeatureExtractor; "
    "WhisperFeatureExtractor()(numpy.zeros(1600), sampling_rate=16000)"
)
_SOUNDFILE = (
    "import io, numpy, soundfile; file = io.BytesIO(); "
    "soundfile.write(file, numpy.zeros(8), 16000, format='WAV'); file.seek(0); "
    "assert len(soundfile.read(file)[0]) == 8"
)
_XFORMERS = """
import torch, xformers.ops as ops
ops.fmha.BlockDiagonalMask.from_seqlens([2, 3])
if torch.cuda.is_available():
    x = torch.ones(1, 5, 2, 32, device="cuda", dtype=torch.bfloat16)
    ops.memory_efficient_attention(x, x, x)
else:
    print("note: its kernels need a GPU; SDPA is used without one")
"""
_GPU = """
import torch
if not torch.cuda.is_available():
    print("note: absent")
    raise SystemExit
x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
assert (x @ x)[0, 0].item() == 64
p = torch.cuda.get_device_properties(0)
count = torch.cuda.device_count()
print(f"note: {count} x {p.name}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
"""

_BATCH = """
import contextlib, io, json, sys
for name, trial in json.loads(sys.argv[1]):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(trial, {})
    except SystemExit:
        pass
    except BaseException:
        continue
    print(json.dumps([name, printed.getvalue()]), flush=True)
"""


class Finding(NamedTuple):
    """The state of a library or device: works, broken (with the reason) or absent (with a hint)."""

    name: str
    version: str
    state: str
    note: str
    required: bool

    @property
    def blocks(self) -> bool:
        """Whether diffa cannot run because of this."""
        return self.required and self.state != "works"

    def row(self) -> dict[str, Any]:
        """Return the finding as a row of a table."""
        need = "required" if self.required else "optional"
        return {
            "name": self.name,
            "version": self.version,
            "need": need,
            "state": self.state,
            "note": self.note,
        }


class _Library(NamedTuple):
    name: str
    trial: str
    extra: str  # the extra of diffa that installs it; empty if it is required


_LIBRARIES = (
    _Library("torch", _TORCH, ""),
    _Library("torchaudio", _TORCHAUDIO, ""),
    _Library("transformers", _TRANSFORMERS, ""),
    _Library("soundfile", _SOUNDFILE, ""),
    _Library("safetensors", "import safetensors.torch", ""),
    _Library("huggingface_hub", "import huggingface_hub", ""),
    _Library("einops", "import einops", ""),
    _Library("xformers", _XFORMERS, "xformers"),
    _Library("timm", "import timm", "timm"),
    _Library("accelerate", "import accelerate", "train"),
    _Library("peft", "import peft", "train"),
    _Library("tensorboard", "import torch.utils.tensorboard", "train"),
    _Library("av", "import av", "audio"),
    _Library("pyarrow", "import pyarrow.parquet", "data"),
    _Library("fastapi", "import fastapi, uvicorn", "serve"),
    _Library("gradio", "import gradio", "ui"),
    _Library("ray", "import ray", "ray"),
)


def examine(names: Sequence[str] | None = None) -> list[Finding]:
    """Check every library, espeak-ng and the GPU, or only those named; takes some seconds."""
    libraries = [lib for lib in _LIBRARIES if names is None or lib.name in names]
    trials = {lib.name: lib.trial for lib in libraries if importlib.util.find_spec(lib.name)}
    if names is None or "GPU" in names:
        trials["GPU"] = _GPU
    states = attempt(trials)
    findings = [_library(library, states.get(library.name)) for library in libraries]
    if names is None or DISTRIBUTION in names:
        findings.insert(0, _installation())
    if names is None or "python" in names:
        findings.insert(0, _python())
    if names is None or "espeak-ng" in names:
        findings.append(_espeak())
    if "GPU" in states:
        findings.append(_gpu(*states["GPU"]))
    return findings


def _python() -> Finding:
    state = "works" if sys.version_info >= (3, 11) else "broken: diffa needs Python 3.11 or later"
    return Finding("python", platform.python_version(), state, sys.executable, True)


def _installation() -> Finding:
    """Whether the distribution is installed, and no stranger's package has replaced its files."""
    version = _version(DISTRIBUTION)
    if _version("diffa") != "unknown":
        state = "broken: the package 'diffa' (a line-diff tool) overwrites this library's files"
        hint = f"pip uninstall diffa && pip install --force-reinstall --no-deps {DISTRIBUTION}"
        return Finding(DISTRIBUTION, version, state, hint, True)
    if version == "unknown":
        state = "broken: not installed, so no part can be found"
        return Finding(DISTRIBUTION, "", state, "pip install -e . in the checkout", True)
    return Finding(DISTRIBUTION, version, "works", str(Path(__file__).parents[1]), True)


def _library(library: _Library, state: tuple[str, str] | None) -> Finding:
    required = not library.extra
    if state is None:
        package = f"{DISTRIBUTION}[{library.extra}]" if library.extra else library.name
        return Finding(library.name, "", "absent", f"pip install '{package}'", required)
    return Finding(library.name, _version(library.name), *state, required)


def _gpu(state: str, note: str) -> Finding:
    if note == "absent":
        return Finding(
            "GPU", "", "absent", "everything runs on the CPU, large models slowly", False
        )
    return Finding("GPU", "", state, note, False)


def _espeak() -> Finding:
    program = shutil.which("espeak-ng")
    if program is None:
        hint = "apt-get install espeak-ng (only needed to synthesise speech for training)"
        return Finding("espeak-ng", "", "absent", hint, False)
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("espeak-ng", "", f"broken: {error}", program, False)
    if done.returncode:
        return Finding("espeak-ng", "", f"broken: {_last(done.stderr)}", program, False)
    version = done.stdout.partition("text-to-speech:")[2].split()
    return Finding("espeak-ng", version[0] if version else "", "works", program, False)


def attempt(trials: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Run pieces of Python; return the state of each, and the note that it printed.

    One process runs them all, because importing torch in each would be slow. Those that fail
    there, or come after a crash, run again in a process of their own.
    """
    batch = _run(_BATCH, json.dumps(list(trials.items())))
    lines = [line for line in batch.stdout.splitlines() if line.startswith('["')]
    passed: dict[str, str] = dict(json.loads(line) for line in lines)
    retried = attempt_apart({k: trial for k, trial in trials.items() if k not in passed})
    return {name: retried.get(name) or ("works", _note(passed[name])) for name in trials}


def attempt_apart(
    trials: Mapping[str, str], timeout: float = _TIMEOUT
) -> dict[str, tuple[str, str]]:
    """Run each piece of Python in a process of its own; return what ``attempt`` returns.

    Args:
        trials: Code by name.
        timeout: Seconds after which a process is ended.
    """
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        states = pool.map(lambda trial: _try(trial, timeout), trials.values())
        return dict(zip(trials, states, strict=True))


def _try(trial: str, timeout: float) -> tuple[str, str]:
    done = _run(trial, timeout=timeout)
    if done.returncode == 0:
        return "works", _note(done.stdout)
    if done.returncode == _TIMED_OUT:
        return f"broken: no answer within {timeout:g} s", ""
    if done.returncode < 0:
        return f"broken: the process was killed by signal {-done.returncode}", ""
    return f"broken: {_last(done.stderr)}", ""


def _run(code: str, *arguments: str, timeout: float = _TIMEOUT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return subprocess.CompletedProcess(command, _TIMED_OUT, output, "")


def _note(output: str) -> str:
    return " ".join(line[6:] for line in output.splitlines() if line.startswith("note: "))


def _last(text: str) -> str:
    """The last line of a traceback: its error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or ["no reason given"])[-1]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
