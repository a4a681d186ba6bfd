"""Where the command line writes: results to stdout, explanations to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_WIDE = 400  # without a terminal nothing is wrapped or cut: the output may be read by a program


def say(text: str) -> None:
    """Write one explanation to stderr."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Write a value to stdout as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Write rows of text to stdout as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        numeric = column in ("parameters", "trained", "width", "rate")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    for line in _lines(console, table):
        print(line)


def _lines(console: Any, table: Any) -> list[str]:
    """Render without the trailing blanks that a table pads its cells with."""
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def _style(cell: str) -> str:
    if cell == "works":
        return "green"
    return "red" if cell.startswith("broken") else ""
