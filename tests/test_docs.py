"""The documentation: every python and bash block runs, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffa import cli
from diffa.errors import AudioError
from diffa.nano.corpus.recordings import fsdd_folder
from diffa.nano.demo import recordings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("python", "bash")
SHOWN = ("text", "toml", "yaml", "json")
"""Languages of blocks that are read, not run."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """A page's blocks in order: language and code."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a bash block, one per line unless a line goes on."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def call(words: list[str]) -> None:
    """Run a `diffa` command in this process: importing torch for each would take minutes."""
    try:
        cli.main(words[1:])
    except SystemExit as end:
        assert not end.code, f"{shlex.join(words)} ended with {end.code}"


def shell(code: str) -> None:
    """Run a block that is more than `diffa` commands."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def digits() -> Path:
    """The spoken digits that the nano corpus is made of; skips where they are not."""
    try:
        return fsdd_folder()
    except AudioError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "diffa data nano" in page.read_text(encoding="utf-8"):
        monkeypatch.setenv("DIFFA_FSDD", str(digits().resolve()))
    for recording in recordings().glob("*.flac"):
        shutil.copy(recording, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    for number, (language, code) in enumerate(blocks(page), start=1):
        where = f"{page.name}, block {number}"
        assert language in (*RUN, *SHOWN), f"{where}: say what it is in, ```text if nothing"
        if language == "python":
            exec(compile(code, where, "exec"), names)
        elif language == "bash" and all(words[0] == "diffa" for words in commands(code)):
            for words in commands(code):
                call(words)
        elif language == "bash":
            shell(code)


def test_a_block_that_fails_is_noticed() -> None:
    with pytest.raises(AssertionError, match="ended with 2"):
        call(["diffa", "spec", "check", "nano", "--set", "sampler.block_lenth=8"])
    with pytest.raises(AssertionError):
        shell("false\ntrue")


def test_pages_of_parts_write_specs_as_they_are_read() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is the extra docs")
    from diffa.spec import registry
    from diffa.spec.spec import Spec

    found = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert found is not None and found.loader is not None
    generate = importlib.util.module_from_spec(found)
    found.loader.exec_module(generate)
    for kind in registry.KINDS:
        _, line, *_ = itertools.islice(generate.kind_page(kind), 2)
        written = yaml.safe_load(line.split("`")[1])
        assert written.keys() < Spec.read("tiny").data.keys(), kind


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is the extra docs")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs.build(config)
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_nothing_of_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {page.stem for page in PAGES[1:]} <= {page.stem for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:link|script|img|iframe)[^>]*(?:href|src)="([^"]+)"', text)
        outside = [address for address in fetched if re.match(r"(?:https?:)?//", address)]
        assert outside == [], page.name
        assert "fonts.g" not in text


@pytest.mark.slow
def test_every_part_is_listed_with_its_options(site: Path) -> None:
    from diffa.spec import registry
    from diffa.spec.schema import read_schema

    for kind in registry.KINDS:
        text = (site / "parts" / f"{kind}s.html").read_text(encoding="utf-8")
        for part in registry.list_parts(kind):
            if not part.is_builtin:
                continue
            assert f'id="{part.name}"' in text, (kind, part.name)
            for option in read_schema(registry.load_part(kind, part.name)).options:
                assert f"<code>{option}</code>" in text, (kind, part.name, option)
    assert "<code>--host</code>" in (site / "commands.html").read_text(encoding="utf-8")
