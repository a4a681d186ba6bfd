"""The axes of a grid: ``--vary PATH=VALUE,VALUE`` parsed into labelled values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffa.errors import SpecError
from diffa.runtime.files import expand
from diffa.spec.yaml import parse_yaml, read_mapping

_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "'\""


class AxisValue(NamedTuple):
    """One value of an axis, and its label in tables."""

    label: str
    value: Any


class GridAxis(NamedTuple):
    """A path of a recipe or its spec, and the values that it takes in turn."""

    path: str
    values: tuple[AxisValue, ...]


def parse_axes(texts: Sequence[str]) -> list[GridAxis]:
    """Parse every axis; raises SpecError if there is none, or two have the same path."""
    axes = [parse_axis(text) for text in texts]
    paths = [axis.path for axis in axes]
    if not paths:
        raise SpecError("there is nothing to compare: give --vary PATH=VALUE,VALUE")
    for path in paths:
        if paths.count(path) > 1:
            raise SpecError(f"--vary {path} is given twice; list all its values in one")
    return axes


def parse_axis(text: str) -> GridAxis:
    """Parse ``PATH=VALUE,VALUE``. A value is YAML, or ``@FILE`` for the mapping in a file.

    Raises:
        SpecError: There is no path or no value, or two values have the same label.
    """
    path, equals, rest = text.partition("=")
    pieces = [piece.strip() for piece in _split_at_commas(rest)]
    if not path.strip() or not equals or not all(pieces):
        raise SpecError(
            f"--vary takes PATH=VALUE,VALUE, such as backbone=llada,llama, got {text!r}"
        )
    values = [_parse_value(piece, text) for piece in pieces]
    labels = _labels(pieces, values)
    if len(set(labels)) < len(labels):
        raise SpecError(f"--vary {text}: a value is given twice")
    return GridAxis(path.strip(), tuple(map(AxisValue, labels, values)))


def _parse_value(piece: str, text: str) -> Any:
    if piece.startswith("@"):
        return read_mapping(expand(piece[1:]))
    try:
        return parse_yaml(piece)
    except SpecError as error:
        raise SpecError(f"--vary {text}: {error}") from error


def _labels(pieces: Sequence[str], values: Sequence[Any]) -> list[str]:
    """Return a file's stem, the name of a part if no other value has it, else the text."""
    names = [value.get("name") if isinstance(value, dict) else None for value in values]
    labels = []
    for piece, name in zip(pieces, names, strict=True):
        unique = isinstance(name, str) and [*names, *pieces].count(name) == 1
        labels.append(Path(piece[1:]).stem if piece[0] == "@" else str(name) if unique else piece)
    return labels


def _split_at_commas(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        depth += (not quote and letter in _OPEN) - (not quote and letter in _CLOSE)
        if letter == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces
