"""Rows of instruction data as files: DIFFA's published JSON, JSONL, Parquet, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffa.data.manifest import Broken, lines, list_items
from diffa.data.messages import from_messages, is_messages, to_messages
from diffa.data.samples import DataError, Fault
from diffa.runtime.files import atomic_write

PUBLISHED = (
    "audio_id",
    "audio_filepath",
    "transcription",
    "input",
    "target",
    "dataset",
    "duration",
    "seed_transcript",
)
"""The keys of DIFFA's instruction data, in its order."""

PREFERENCE = ("chosen", "rejected", "dpo_explanation", "dpo_source")
"""The keys that DIFFA-2's preference data adds."""

EXTRA = ("speaker", "split", "attributes", "measures")
"""What this library keeps besides, in JSONL and Parquet: checks between splits need it."""

Row = dict[str, Any]
FORMS = (".json", ".jsonl", ".parquet")


def read_rows(path: str | os.PathLike[str]) -> tuple[list[Row], list[Fault]]:
    """Read rows from .json (a list), .jsonl or .parquet, in either form; returns faults by row.

    Relative audio paths are made to start from the file's folder. Rows of the ``messages`` form
    are turned into rows of the published one. Raises DataError for a file that cannot be read.
    """
    found = list(numbered_rows(path))
    rows = [row for _, row in found if not isinstance(row, Fault)]
    return rows, [row for _, row in found if isinstance(row, Fault)]


def numbered_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, Row | Fault]]:
    """Yield every row with its number, counted from 1; see ``read_rows``."""
    path = Path(path).expanduser()
    for number, row in enumerate(_raw(path), start=1):
        if isinstance(row, Broken):
            yield number, Fault(number, str(row))
        elif not isinstance(row, dict):
            yield number, Fault(number, f"is {type(row).__name__}, not a mapping")
        else:
            try:
                flat = from_messages(row) if is_messages(row) else row
            except DataError as error:
                yield number, Fault(number, str(error))
            else:
                yield number, _placed(flat, path.parent)


def _raw(path: Path) -> Iterable[Any]:
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        if path.suffix == ".json":
            return [row for *_, row in list_items(path.read_bytes(), str(path))]
        with path.open("rb") as file:
            return [row for *_, row in lines(file)]
    except FileNotFoundError as error:
        raise DataError(f"there is no manifest {path}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _placed(row: Row, folder: Path) -> Row:
    """Make the audio's path independent of where the manifest lies."""
    name = row.get("audio_filepath")
    if not isinstance(name, str) or not name:
        return row
    return {**row, "audio_filepath": str((folder / Path(name).expanduser()).absolute())}


def write_rows(
    path: str | os.PathLike[str], rows: Sequence[Row], *, messages: bool = False
) -> Path:
    """Write rows whole or not at all, in the form that the file's name ends in.

    ``.json`` holds the published keys alone, ``.jsonl`` and ``.parquet`` also ``EXTRA``. Audio
    below the file's folder is named relative to it, so that the folder can be moved.

    Args:
        messages: write ``messages`` + ``audios``, which other trainers read.

    Raises:
        DataError: another ending, pyarrow is missing, or the file cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix not in FORMS:
        raise DataError(f"{path} must end in {', '.join(FORMS)}")
    kept = [_relative(_kept(row, path.suffix), path.parent) for row in rows]
    shaped = [to_messages(row) for row in kept] if messages else kept
    _whole(path, {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix], shaped)
    return path


def _kept(row: Row, suffix: str) -> Row:
    empty: Row = dict.fromkeys(PUBLISHED, "") | {"duration": 0.0}
    ours = [*PREFERENCE, *(EXTRA if suffix != ".json" else ())]
    return {k: row.get(k, empty[k]) for k in PUBLISHED} | {k: row[k] for k in ours if k in row}


def _relative(row: Row, folder: Path) -> Row:
    name = Path(row["audio_filepath"])
    home = folder.absolute()
    below = row["audio_filepath"] and name.is_absolute() and name.is_relative_to(home)
    return {**row, "audio_filepath": name.relative_to(home).as_posix()} if below else row


def _whole(path: Path, write: Callable[[Path, Sequence[Row]], None], rows: Sequence[Row]) -> None:
    """Write beside the file and rename: a full disk leaves what was there before."""
    try:
        with atomic_write(path) as draft:
            write(draft, rows)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def _json(path: Path, rows: Sequence[Row]) -> None:
    path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _jsonl(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install 'diffa-audio[data]'") from error
    return pyarrow, parquet


def _parquet(path: Path, rows: Sequence[Row]) -> None:
    pyarrow, parquet = _arrow()
    # mappings with keys of their own per row become lists of pairs: every row has the same type
    paired = [
        {k: list(v.items()) if isinstance(v, dict) else v for k, v in row.items()} for row in rows
    ]
    columns = list(dict.fromkeys(name for row in paired for name in row))
    kinds = {
        "duration": pyarrow.float64(),
        "attributes": pyarrow.map_(pyarrow.string(), pyarrow.string()),
        "measures": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
        "messages": pyarrow.list_(
            pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
        ),
        "audios": pyarrow.list_(pyarrow.string()),
    }
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in columns])
    parquet.write_table(pyarrow.Table.from_pylist(paired, schema=schema), path)


def _parquet_rows(path: Path) -> list[Any]:
    pyarrow, parquet = _arrow()
    try:
        found = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not Parquet: {error}") from error
    return [{k: _mapping(k, v) for k, v in row.items() if v is not None} for row in found]


def _mapping(name: str, value: Any) -> Any:
    return dict(value) if name in ("attributes", "measures") else value
