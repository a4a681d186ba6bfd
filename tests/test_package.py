"""The wheel and the source distribution: built, checked, installed, and used from site-packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

TESTED = ("test_audio.py", "test_chat.py", "test_model.py", "test_save.py", "spec", "samplers")

STRANGER = """\
Metadata-Version: 2.1
Name: diffa
Version: 0.0.4
"""


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command without this checkout on its path; return its stdout."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, built from the source distribution."""
    pytest.importorskip("build", reason="build is in the extra dev")
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    keep = ("diffa", "docs", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
    source.mkdir()
    for name in keep:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "-o", folder / "dist", source, cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel; it shares this environment's libraries."""
    folder = tmp_path_factory.mktemp("installed") / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    own = next(folder.glob("lib/python*/site-packages"))
    shared = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in shared]
    (own / "shared.pth").write_text("\n".join(lines) + "\n")
    (wheel,) = dist.glob("*.whl")
    offline = ("--no-index", "--no-deps", "--disable-pip-version-check", "-q")
    executable = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", executable)
    run(*pip, "install", *offline, wheel, cwd=folder.parent)
    return executable


def test_the_files_are_named_and_described_as_the_index_wants_them(dist: Path) -> None:
    pytest.importorskip("twine", reason="twine is in the extra dev")
    files = sorted(dist.iterdir())
    assert [file.name.partition("-")[0] for file in files] == ["diffa_audio", "diffa_audio"]
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist)


def test_wheel_and_source_hold_every_module_and_asset(dist: Path) -> None:
    kinds = (".py", ".yaml", ".json", ".safetensors", ".flac", ".typed")
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "diffa").rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    } | {"diffa/py.typed"}
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        assert expected <= set(wheel.namelist())
        assert not any(name.startswith(("tests/", "benchmarks/")) for name in wheel.namelist())
    with tarfile.open(next(dist.glob("*.tar.gz"))) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
        assert expected | {"LICENSE", "README.md"} <= names


def test_the_installed_command_answers_about_a_shipped_recording(python: Path) -> None:
    code = "import diffa, diffa.nano.demo as d; print(diffa.__file__); print(d.recordings())"
    module, recordings = run(python, "-c", code, cwd=python.parent).splitlines()
    assert Path(module).is_relative_to(python.parents[1])
    command = python.with_name("diffa")
    recording = Path(recordings) / "digits.flac"
    reply = run(command, "ask", recording, "How many digits are spoken?", cwd=python.parent)
    assert reply == "four\n"


def test_tests_pass_against_the_installed_package(python: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    paths = [f"tests/{name}" for name in TESTED]
    words = ("-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider")
    report = run(python, *words, *paths, cwd=tmp_path)  # fails unless pytest exits with 0
    assert "[100%]" in report


def test_doctor_reports_the_strangers_package_that_replaced_the_installed_files(
    python: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "environment"
    shutil.copytree(python.parents[1], copy, symlinks=True)
    own = next(copy.glob("lib/python*/site-packages"))
    (own / "diffa" / "__init__.py").write_text("from .diffa import main\n")
    (own / "diffa" / "diffa.py").write_text("def main(): ...\n")
    (own / "diffa-0.0.4.dist-info").mkdir()
    (own / "diffa-0.0.4.dist-info" / "METADATA").write_text(STRANGER)
    report = run(copy / "bin/python", "-m", "diffa", "doctor", "--json", cwd=tmp_path, code=1)
    (row,) = [row for row in json.loads(report) if row["name"] == "diffa-audio"]
    assert row["state"].startswith("broken: the package 'diffa'")
    assert row["note"].startswith("pip uninstall diffa")
