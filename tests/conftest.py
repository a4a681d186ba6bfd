"""Fixtures that many tests share: the golden folders, and models built from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers import GOLDEN, ROOT, toy
from helpers.golden import golden_spec
from safetensors.torch import load_file

import diffa
from diffa.errors import AudioError
from diffa.nano.corpus.recordings import fsdd_folder

FOLDERS = ("diffa1-tiny", "diffa2-tiny")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Recorded digits in a folder beside the checkout; tests that need them are skipped without.
DATA = ROOT.parent / "shared" / "data" / "fsdd"
if DATA.is_dir():
    os.environ.setdefault("DIFFA_FSDD", str(DATA))
hypothesis.settings.register_profile("shared", deadline=None)  # others use the machine, too
hypothesis.settings.load_profile("shared")
torch.set_num_threads(int(os.environ.get("DIFFA_TEST_THREADS", "1")))


@pytest.fixture(scope="session", params=FOLDERS)
def golden(request: pytest.FixtureRequest) -> tuple[str, diffa.Model, dict[str, torch.Tensor]]:
    """A golden folder's name, its model, and what the original code computes."""
    name = request.param
    model = diffa.build(golden_spec(name))
    return name, model, load_file(GOLDEN / name / "expected.safetensors")


@pytest.fixture(scope="session")
def golden1() -> tuple[diffa.Model, dict[str, torch.Tensor]]:
    """The DIFFA-1 golden model and its numbers."""
    name = "diffa1-tiny"
    return diffa.build(golden_spec(name)), load_file(GOLDEN / name / "expected.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and eight tones on disk."""
    return toy.write_world(tmp_path_factory.mktemp("world"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``fsdd`` where the Free Spoken Digit Dataset is not."""
    try:
        fsdd_folder()
    except AudioError as error:
        for item in items:
            if item.get_closest_marker("fsdd") is not None:
                item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that forks in a process of its own: a fork loses the threads of other tests,
    and waits for ever for a lock that one of them held."""
    if pyfuncitem.get_closest_marker("forks") is None or "DIFFA_TEST_FORKS" in os.environ:
        return None
    words = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*words, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, "DIFFA_TEST_FORKS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return True
