"""What is varied: ``PATH=VALUE,VALUE`` read into an axis of labelled values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffa.errors import SpecError
from diffa.spec.yaml import parse_yaml, read_mapping

_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "'\""


class Level(NamedTuple):
    """One value of an axis, and what tables call it."""

    label: str
    value: Any


class Axis(NamedTuple):
    """A place in a recipe or its spec, and the values it takes in turn."""

    path: str
    levels: tuple[Level, ...]


def read_axis(text: str) -> Axis:
    """Read ``PATH=VALUE,VALUE``: values are YAML, or ``@FILE`` for the mapping in a file.

    Raises:
        SpecError: no path or no value, or two values that cannot be told apart.
    """
    path, equals, rest = text.partition("=")
    pieces = [piece.strip() for piece in _split(rest)]
    if not path.strip() or not equals or not all(pieces):
        raise SpecError(
            f"--vary takes PATH=VALUE,VALUE, such as backbone=llada,llama, got {text!r}"
        )
    values = [_value(piece, text) for piece in pieces]
    labels = _labels(pieces, values)
    if len(set(labels)) < len(labels):
        raise SpecError(f"--vary {text}: a value is given twice")
    return Axis(path.strip(), tuple(map(Level, labels, values)))


def read_axes(texts: Sequence[str]) -> list[Axis]:
    """Read every axis; SpecError where two vary the same place, or there is none."""
    axes = [read_axis(text) for text in texts]
    paths = [axis.path for axis in axes]
    if not paths:
        raise SpecError("there is nothing to compare: give --vary PATH=VALUE,VALUE")
    for path in paths:
        if paths.count(path) > 1:
            raise SpecError(f"--vary {path} is given twice; list all its values in one")
    return axes


def _value(piece: str, text: str) -> Any:
    if piece.startswith("@"):
        return read_mapping(Path(piece[1:]).expanduser())
    try:
        return parse_yaml(piece)
    except SpecError as error:
        raise SpecError(f"--vary {text}: {error}") from error


def _labels(pieces: Sequence[str], values: Sequence[Any]) -> list[str]:
    """A file's stem, a part's name where it is the only one of that name, else the text."""
    names = [value.get("name") if isinstance(value, dict) else None for value in values]
    labels = []
    for piece, name in zip(pieces, names, strict=True):
        alone = isinstance(name, str) and [*names, *pieces].count(name) == 1
        labels.append(Path(piece[1:]).stem if piece[0] == "@" else str(name) if alone else piece)
    return labels


def _split(text: str) -> list[str]:
    """Split at commas that stand in no brackets and no quotes."""
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
