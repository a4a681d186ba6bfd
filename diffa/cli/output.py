"""Output of the command line: results go to stdout, notes to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_WIDE = 400  # without a terminal nothing is wrapped: a program may read the output


def print_note(text: str) -> None:
    """Print a note to stderr."""
    print(text, file=sys.stderr)


def print_notes(lines: Sequence[str], title: str, limit: int = 10) -> None:
    """Print the number of lines and the first of them to stderr; nothing without lines."""
    if not lines:
        return
    print_note(f"{len(lines)} {title}:")
    for line in lines[:limit]:
        print_note(f"  {line}")
    if len(lines) > limit:
        print_note(f"  and {len(lines) - limit} more")


def print_json(value: Any) -> None:
    """Print a value to stdout as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows of text to stdout as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    table = Table(
        title=Text(title, "bold") if title else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    for column in columns:
        numeric = column in ("parameters", "trained", "width", "rate")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        if line.strip():
            print(line.rstrip())  # a table pads its cells with blanks


def _style(cell: str) -> str:
    if cell == "works":
        return "green"
    return "red" if cell.startswith("broken") else ""
