"""Rows of instruction data as files: DIFFA's published JSON, JSONL, Parquet, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffa.audio import read_dataset_audio, write_wav
from diffa.data.fields import field_fault
from diffa.data.messages import to_manifest_row, to_messages
from diffa.data.samples import DataError, Fault, ManifestRow
from diffa.data.tables import TABLE_SUFFIXES, BrokenRow, import_pyarrow, iter_rows
from diffa.errors import describe_error
from diffa.runtime.files import atomic_write, expand, replace_folder

MANIFEST_FIELDS = (
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

PREFERENCE_FIELDS = ("chosen", "rejected", "dpo_explanation", "dpo_source")
"""The keys that DIFFA-2's preference data adds."""

EXTRA_FIELDS = ("speaker", "split", "attributes", "measures", "transcribed_by")
"""What this library keeps besides, in JSONL and Parquet: checks between splits need it."""


def read_rows(path: str | os.PathLike[str]) -> tuple[list[ManifestRow], list[Fault]]:
    """Read rows from .json (a list), .jsonl or .parquet, in any form; returns faults by row.

    Relative audio paths are made to start from the file's folder. Rows of other forms
    (``to_manifest_row``) become rows of the published one. Raises DataError for a file that
    cannot be read.
    """
    numbered = list(numbered_rows(path))
    rows = [row for _, row in numbered if not isinstance(row, Fault)]
    return rows, [row for _, row in numbered if isinstance(row, Fault)]


def numbered_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, ManifestRow | Fault]]:
    """Yield every row with its number, counted from 1; see ``read_rows``."""
    path = expand(path)
    for number, row in enumerate(iter_rows(path), start=1):
        if isinstance(row, BrokenRow):
            yield number, Fault(number, str(row))
            continue
        try:
            if not isinstance(row, dict):
                raise DataError(f"is {type(row).__name__}, not a mapping")
            row = _from_pairs(row) if path.suffix == ".parquet" else row
            flat = to_manifest_row(row)
            if fault := field_fault(flat):
                raise DataError(fault)
            yield number, _placed(flat, path.parent)
        except Exception as error:  # whatever is wrong with a row is that row's error
            yield number, Fault(number, describe_error(error))


def _placed(row: ManifestRow, folder: Path) -> ManifestRow:
    """Make the audio's path independent of where the manifest lies."""
    name = row.get("audio_filepath")
    if not isinstance(name, str) or not name:
        return row
    return {**row, "audio_filepath": str((folder / expand(name)).absolute())}


def write_rows(
    path: str | os.PathLike[str], rows: Sequence[ManifestRow], *, messages: bool = False
) -> Path:
    """Write rows whole or not at all, in the form that the file's name ends in.

    ``.json`` holds the published keys alone, the other forms also ``EXTRA_FIELDS``. Audio below
    the file's folder is named relative to it, so that the folder can be moved. Embedded audio
    becomes WAV files in a folder beside it.

    Args:
        messages: write ``messages`` + ``audios``, which other trainers read.

    Raises:
        DataError: another ending, pyarrow is missing, or the file cannot be written.
    """
    path = expand(path)
    if path.suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path} must end in {', '.join(TABLE_SUFFIXES)}")
    rows = _extract_audio(rows, path)
    entries = [_relative(_select(row, path.suffix), path.parent) for row in rows]
    if messages:
        entries = [to_messages(row) for row in entries]
    writers = {".json": _write_json, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    try:
        with atomic_write(path) as draft:
            writers[path.suffix](draft, entries)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error
    return path


def _extract_audio(rows: Sequence[ManifestRow], path: Path) -> list[ManifestRow]:
    """Write the audio that rows embed to ``NAME-audio/`` beside the file, and name it in them."""
    if not any(row.get("audio") for row in rows):
        return list(rows)
    folder, named = path.parent / f"{path.stem}-audio", []
    with replace_folder(folder) as draft:
        for number, row in enumerate(rows, start=1):
            if row.get("audio"):
                wave, rate = read_dataset_audio(row["audio"], path.parent)
                write_wav(draft / f"{number:06d}.wav", wave.numpy(), rate)
                file = (folder / f"{number:06d}.wav").absolute()
                row = {**row, "audio_filepath": str(file)}
            named.append(row)
    return named


def _select(row: ManifestRow, suffix: str) -> ManifestRow:
    empty: ManifestRow = dict.fromkeys(MANIFEST_FIELDS, "") | {"duration": 0.0}
    ours = [*PREFERENCE_FIELDS, *(EXTRA_FIELDS if suffix != ".json" else ())]
    return {k: empty[k] if row.get(k) is None else row[k] for k in MANIFEST_FIELDS} | {
        k: row[k] for k in ours if k in row
    }


def _relative(row: ManifestRow, folder: Path) -> ManifestRow:
    name = Path(row["audio_filepath"])
    home = folder.absolute()
    below = row["audio_filepath"] and name.is_absolute() and name.is_relative_to(home)
    return {**row, "audio_filepath": name.relative_to(home).as_posix()} if below else row


def _write_json(path: Path, rows: Sequence[ManifestRow]) -> None:
    text = json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def _write_jsonl(path: Path, rows: Sequence[ManifestRow]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Sequence[ManifestRow]) -> None:
    pyarrow, parquet = import_pyarrow()
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
    with path.open("wb") as file:  # names may look like addresses to pyarrow
        parquet.write_table(pyarrow.Table.from_pylist(paired, schema=schema), file)


def _from_pairs(row: Any) -> Any:
    """Undo what Parquet does to mappings, and leave out what it fills with nulls."""
    return {
        name: dict(value) if name in ("attributes", "measures") else value
        for name, value in row.items()
        if value is not None
    }
