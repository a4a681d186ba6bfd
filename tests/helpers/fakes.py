"""Packages with parts, written into a folder as pip would leave them there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from diffa.spec import registry

POOL = """
class Pool:
    def __init__(self, source, width, *, stride: int = 4, mode: str = "mean"):
        self.width = width
    def __call__(self, features): ...
    def out_lengths(self, lengths): ...
"""

# One option of every type that a spec can hold.
MANY = """
from __future__ import annotations
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
if TYPE_CHECKING:
    from somewhere_else import FeatureSpec
Mode = Literal["mean", "max"]
class Many:
    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        flag: bool = True,
        count: int = 3,
        rate: float = 0.5,
        label: str = "x",
        mode: Mode = "mean",
        taps: list[int] | None = None,
        scales: list[float] = [1.0],
        extra: Mapping[str, Any] | None = None,
        either: int | float = 1,
        table: dict[str, float] = {},
    ): ...
    def __call__(self, features): ...
    def out_lengths(self, lengths): ...
"""

# A sampler with an option that none of diffa's has.
SAMPLER = '''
from diffa.samplers.blockwise import Blockwise
class Capped(Blockwise):
    """Blockwise with a number of passes.

    Args:
        passes: Forward passes for the whole answer.
    """
    def __init__(self, vocab, *, passes: int = 4):
        super().__init__(vocab, steps=passes)
'''


def install(
    folder: Path,
    package: str,
    points: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str] | None = None,
) -> Path:
    """Write a package with entry points ``{kind: {name: target}}`` and modules ``{name: code}``."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = []
    for kind, targets in points.items():
        lines += [f"[diffa.{kind}s]", *(f"{name} = {target}" for name, target in targets.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, code in (modules or {}).items():
        (folder / f"{name}.py").write_text(code)
    return info


def site_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a folder on the path for one test; modules imported from it are forgotten after."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    registry.clear_scan()
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    monkeypatch.undo()
    registry.clear_scan()
