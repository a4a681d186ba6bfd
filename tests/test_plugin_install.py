"""A third-party package is built, installed, used by name; a broken one beside it is harmless."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PLUGIN = HERE / "plugin"

USE = """
import json, sys
import diffa
from diffa.spec import registry

assert "average" in diffa.available("adapter") and "crashing" in diffa.available("adapter")
plugins = ("acme_diffa", "broken_diffa")
assert not any(name.startswith(plugins) for name in sys.modules), "listing imports a plugin"
tiny = diffa.Spec.read("tiny")
spec = tiny.set("adapters", {"semantic": {"name": "average", "stride": 5}})
model = diffa.build(spec)
import torch
embeds = model.listen(torch.randn(16000))
answer = model.generate(torch.arange(5), torch.randn(16000), max_tokens=4)
print(json.dumps({
    "embeds": list(embeds.values.shape),
    "tokens": len(answer.tokens[0]),
    "home": sys.modules["acme_diffa"].__file__,
    "broken": [name for name in sys.modules if "broken_diffa" in name],
    "conv": registry.load_part("adapter", "conv").__module__,
}))
"""

FAIL = """
import diffa
for name in ("missing", "crashing", "absent", "half", "broken-diffa:conv"):
    try:
        diffa.build(diffa.Spec.read("tiny").set("adapters", {"semantic": name}).data)
    except diffa.errors.PluginError as error:
        print(" ".join(str(error).split()))
"""


def run(*command: str, site: Path | None = None, cwd: Path | None = None) -> str:
    """Run Python, that of the environment ``site`` where given, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    python = sys.executable if site is None else str(site / "bin" / "python")
    done = subprocess.run(
        [python, *command],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command[:3]}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheels of both packages; no network is used.

    It sees this environment's libraries, since torch alone would be gigabytes a second time.
    """
    place = tmp_path_factory.mktemp("plugins")
    shutil.copytree(PLUGIN, place / "source")  # building leaves files behind
    offline = ("--no-index", "--no-deps", "--disable-pip-version-check", "-q")
    for source in (place / "source", place / "source" / "broken"):
        run("-m", "pip", "wheel", "--no-build-isolation", *offline, "-w", str(place), str(source))
    wheels = [str(wheel) for wheel in sorted(place.glob("*.whl"))]
    assert [Path(wheel).name.split("-")[0] for wheel in wheels] == ["acme_diffa", "broken_diffa"]
    environment = place / "environment"
    run("-m", "venv", "--without-pip", str(environment))
    own = next(environment.glob("lib/python*/site-packages"))
    shared = [folder for folder in sys.path if folder.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({folder!r})" for folder in shared]
    (own / "shared.pth").write_text("\n".join(lines) + "\n")
    python = str(environment / "bin" / "python")
    run("-m", "pip", "--python", python, "install", *offline, *wheels)
    return environment


def test_an_installed_adapter_is_used_by_name_beside_a_broken_plugin(site: Path) -> None:
    result = json.loads(run("-c", USE, site=site, cwd=site.parent))
    assert result["embeds"] == [1, 10, 64]  # 50 frames, five at a time
    assert result["tokens"] == 4
    assert Path(result["home"]).is_relative_to(site)
    assert result["broken"] == []
    assert result["conv"] == "diffa.adapters.conv"  # diffa's own name always means diffa's


def test_a_plugins_own_tests_pass_where_it_is_installed(site: Path, tmp_path: Path) -> None:
    shutil.copytree(PLUGIN / "tests", tmp_path / "tests")
    shutil.copy(PLUGIN / "pyproject.toml", tmp_path)
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", site=site, cwd=tmp_path)
    assert "passed" in output and "failed" not in output


def test_plugins_lists_what_is_broken_and_why(site: Path) -> None:
    output = run("-m", "diffa", "plugins", "--json", site=site, cwd=site.parent)
    health = {(row["kind"], row["name"]): row["health"] for row in json.loads(output)}
    assert health["adapter", "average"] == "works"
    assert health["adapter", "conv"] == "works"
    assert "a_package_that_nobody_has" in health["adapter", "missing"]
    assert "pip install 'broken-diffa[fast]'" in health["adapter", "missing"]
    assert "the stars are wrong" in health["adapter", "crashing"]
    assert "does not exist" in health["adapter", "absent"]
    assert "Half lacks out_lengths" in health["adapter", "half"]
    assert health["sampler", "leaving"].startswith("broken")


def test_naming_a_broken_part_says_whose_it_is(site: Path) -> None:
    output = run("-c", FAIL, site=site, cwd=site.parent).strip().splitlines()
    assert len(output) == 5, output
    assert all("broken-diffa" in line for line in output), output
