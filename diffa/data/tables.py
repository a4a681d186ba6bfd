"""Read rows of JSON lists, JSONL and Parquet: every part of diffa reads files of rows here."""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffa.data.samples import DataError
from diffa.errors import describe
from diffa.runtime.files import expand
from diffa.runtime.text import parse_json

TABLE_SUFFIXES = (".json", ".jsonl", ".parquet")
"""Endings of the files that ``iter_rows`` reads."""

_BLANK = " \t\r\n"


class BrokenRow(str):
    """A row that is not even JSON: what is wrong with it."""

    __slots__ = ()


class RowSpan(NamedTuple):
    """A row's value (or a BrokenRow), and the bytes of its file that it takes up."""

    start: int
    end: int
    value: Any


class RowIndex:
    """Where rows of a ``.json`` or ``.jsonl`` file begin and end; rows are parsed when read.

    An index of ten million rows takes 160 MB, whatever the rows hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._ends = array("q"), array("q")

    def append(self, span: RowSpan) -> None:
        """Add a row; only its place in the file is kept."""
        broken = isinstance(span.value, BrokenRow)
        self._starts.append(-1 if broken else span.start)
        self._ends.append(span.end)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            return self._parse(file, index)

    def read(self, first: int, end: int) -> list[Any]:
        """Return rows ``first`` to before ``end``; a row that was broken is a BrokenRow."""
        with self.path.open("rb") as file:
            return [self._parse(file, index) for index in range(first, min(end, len(self)))]

    def _parse(self, file: BinaryIO, index: int) -> Any:
        start = self._starts[index]
        if start < 0:
            return BrokenRow("is broken JSON")
        file.seek(start)
        return parse_json(file.read(self._ends[index] - start))


def iter_spans(path: Path) -> Iterator[RowSpan]:
    """Yield the rows of a ``.json`` list or of JSONL with their places in the file.

    Blank lines of JSONL are no rows. A row that is not JSON has a BrokenRow as its value.

    Raises:
        DataError: the file cannot be read, or a ``.json`` file holds no list.
    """
    try:
        if path.suffix == ".json":
            yield from _list_items(path.read_bytes(), str(path))
            return
        start = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip() and line.strip() != codecs.BOM_UTF8:
                    yield RowSpan(start, start + len(line), _parse_line(line))
                start += len(line)
    except FileNotFoundError as error:
        raise DataError(f"there is no manifest {path}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def iter_rows(path: str | os.PathLike[str], omit: Collection[str] = ()) -> Iterator[Any]:
    """Yield the rows of a JSON list, JSONL or Parquet file in order.

    Args:
        path: its ending says what it holds (``TABLE_SUFFIXES``).
        omit: columns of a Parquet file that are not read (embedded audio).

    Raises:
        DataError: the file cannot be read, or pyarrow is missing.
    """
    path = expand(path)
    if path.suffix != ".parquet":
        yield from (span.value for span in iter_spans(path))
        return
    table = open_parquet(path)
    columns = [name for name in table.schema_arrow.names if name not in omit]
    for group in range(table.num_row_groups):
        yield from table.read_row_group(group, columns=columns).to_pylist()


def open_parquet(path: Path) -> Any:
    """Open a file as ``pyarrow.parquet.ParquetFile``; raises DataError where that fails."""
    pyarrow, parquet = import_pyarrow()
    try:
        return parquet.ParquetFile(path.open("rb"))  # names may look like addresses to pyarrow
    except FileNotFoundError as error:
        raise DataError(f"there is no manifest {path}") from error
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error


def import_pyarrow() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet; raises DataError without them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install 'diffa-audio[data]'") from error
    return pyarrow, parquet


def _list_items(data: bytes, name: str) -> Iterator[RowSpan]:
    text = _decode(data)
    if text is None:
        raise DataError(f"{name} is not UTF-8 text")
    decoder, ascii_only = json.JSONDecoder(), len(text) == len(data)
    at = _skip_blank(text, 1 if text.startswith("\ufeff") else 0)  # a byte-order mark
    if text[at : at + 1] != "[":
        raise DataError(f"{name} is not a JSON list: it begins with {text[at : at + 20]!r}")
    at, offset = _skip_blank(text, at + 1), 0
    before = 0  # characters already counted in ``offset`` bytes
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = describe(error)
            yield RowSpan(
                0, 0, BrokenRow(f"is broken JSON ({reason}); nothing after it can be read")
            )
            return
        if ascii_only:
            yield RowSpan(at, end, value)
        else:  # places are bytes, the decoder counts characters
            start = offset + len(text[before:at].encode())
            offset, before = start + len(text[at:end].encode()), end
            yield RowSpan(start, offset, value)
        at = _skip_blank(text, end)
        if text[at : at + 1] == ",":
            at = _skip_blank(text, at + 1)
        elif text[at : at + 1] != "]":
            rest = repr(text[at : at + 12]) if text[at:] else "the end of the file"
            yield RowSpan(0, 0, BrokenRow(f"is expected after {rest}, where ',' or ']' should be"))
            return


def _parse_line(line: bytes) -> Any:
    text = _decode(line)
    if text is None:
        return BrokenRow("is not UTF-8 text")
    try:
        return parse_json(text)
    except ValueError as error:
        return BrokenRow(f"is broken JSON: {error}")


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _skip_blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANK:
        at += 1
    return at
