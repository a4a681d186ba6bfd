"""Manifests as the data commands read and write them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffa.cli.output import print_notes


def read_manifests(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read manifests one after another; rows with errors are listed on stderr.

    Raises:
        DataError: A file cannot be read, or no file has a usable row.
    """
    from diffa.data.formats import read_rows
    from diffa.data.samples import DataError

    paths, rows = list(paths), []
    for path in paths:
        usable, faults = read_rows(path)
        print_notes([f"{path} {fault}" for fault in faults], "rows left out")
        rows += usable
    if not rows:
        raise DataError(f"no usable row in {', '.join(str(path) for path in paths)}")
    return rows


def with_progress(rows: Iterable[Any], total: int) -> list[Any]:
    """Collect rows with a progress bar on stderr; without a terminal there is no bar."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not sys.stderr.isatty()
    return list(track(rows, "recordings", total=total, console=console, disable=hidden))


def cell(value: Any) -> str:
    """Return a value as the text of a table's cell."""
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return "" if value is None else str(value)
