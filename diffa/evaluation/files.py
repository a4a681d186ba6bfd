"""Benchmarks' files: JSON, JSONL and Parquet, with audio beside them or inside."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffa.data.manifest import Broken, lines, list_items
from diffa.data.samples import DataError
from diffa.errors import AudioError
from diffa.evaluation.items import EvaluationError, Row

AUDIO = ("audio", "audio_path", "audio_filepath", "context", "wav", "audio_file", "audio_id")
"""Columns that may hold a row's audio, the first one that does is taken."""
_KINDS = (".json", ".jsonl", ".parquet")


class Table:
    """The rows of a benchmark's files; embedded audio is read only when asked for.

    Args:
        path: a file, or a folder: every JSON, JSONL or Parquet file in it, in order of names.
        audio: folder where relative audio paths start; each file's own folder where None.

    Raises:
        EvaluationError: there is no such file, or no row in it.
    """

    def __init__(self, path: str | Path, audio: str | Path | None = None) -> None:
        self.path = Path(path).expanduser()
        self.folder = Path(audio).expanduser() if audio else None
        self.rows: list[Row] = []
        self._places: list[tuple[Path, int]] = []  # a row's file, and its index in it
        self._held: tuple[Path, int, list[Any]] | None = None  # the last row group's audio
        files = _files(self.path)
        for file in files:
            for index, found in enumerate(_read(file, alone=len(files) == 1)):
                broken = isinstance(found, Broken)
                fields = found if isinstance(found, dict) else {}
                fault = "" if isinstance(found, dict) else f"is {type(found).__name__}"
                fault = str(found) if broken else fault
                self.rows.append(Row(len(self.rows) + 1, fields, fault, file.name))
                self._places.append((file, index))
        if not self.rows:
            raise EvaluationError(f"{self.path} has no rows")

    def audio(self, number: int) -> tuple[Any, int]:
        """Return the waveform (S,) of row ``number`` and its rate; raises AudioError."""
        from diffa.audio import read_dataset_audio

        file, index = self._places[number - 1]
        if file.suffix == ".parquet":
            return read_dataset_audio(self._embedded(file, index), self.folder or file.parent)
        fields = self.rows[number - 1].fields
        for column in AUDIO:
            if fields.get(column):
                return read_dataset_audio(fields[column], self.folder or file.parent)
        raise AudioError(f"has no audio: none of the columns {', '.join(AUDIO)}")

    def seconds(self, number: int) -> float:
        """Duration of a row's audio by its header; 0 where it cannot be told cheaply."""
        import soundfile

        file, index = self._places[number - 1]
        try:
            if file.suffix == ".parquet":
                found = self._embedded(file, index)
            else:
                fields = self.rows[number - 1].fields
                found = next((fields[name] for name in AUDIO if fields.get(name)), None)
            if isinstance(found, dict) and found.get("array") is not None:
                return len(found["array"]) / float(found["sampling_rate"])
            if isinstance(found, dict):
                found = io.BytesIO(found["bytes"]) if found.get("bytes") else found.get("path")
            if isinstance(found, str):
                found = (self.folder or file.parent) / Path(found).expanduser()
            about = soundfile.info(found)
        except (AudioError, OSError, RuntimeError, TypeError):
            return 0.0  # what is wrong with it is said when it is read
        return float(about.frames / about.samplerate)

    def _embedded(self, file: Path, index: int) -> Any:
        """The audio of one row of a Parquet file, through its row group."""
        parquet = _parquet(file)
        columns = [name for name in AUDIO if name in parquet.schema_arrow.names]
        if not columns:
            raise AudioError(f"has no audio: none of the columns {', '.join(AUDIO)}")
        start = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if index < start + count:
                if self._held is None or self._held[:2] != (file, group):
                    held = parquet.read_row_group(group, columns=columns[:1]).column(0).to_pylist()
                    self._held = (file, group, held)
                return self._held[2][index - start]
            start += count
        raise AudioError(f"{file} has no row {index}")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in _KINDS:
            raise EvaluationError(f"{path}: files end in {', '.join(_KINDS)}")
        return [path]
    found = sorted(file for kind in _KINDS for file in path.rglob(f"*{kind}"))
    if not found:
        if not path.is_dir():
            raise EvaluationError(f"there is no file or folder {path}")
        raise EvaluationError(f"{path} holds no {', '.join(_KINDS)} file")
    suffix = found[0].suffix
    if any(file.suffix != suffix for file in found):
        names = ", ".join(str(file.relative_to(path)) for file in found[:6])
        raise EvaluationError(f"{path} holds files of several kinds ({names}): name one of them")
    return found


def _read(file: Path, *, alone: bool) -> Iterator[Any]:
    """Yield every row of a file, or a ``Broken`` that says what is wrong with it.

    A file that cannot be opened at all is an error if it is alone, else one broken row.
    """
    try:
        yield from _rows(file)
    except EvaluationError as error:
        if alone:
            raise
        yield Broken(f"stands for a file: {error}")


def _rows(file: Path) -> Iterator[Any]:
    try:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.suffix == ".json":
            yield from (value for _, _, value in list_items(file.read_bytes(), str(file)))
        else:
            with file.open("rb") as opened:
                yield from (value for _, _, value in lines(opened))
    except DataError as error:
        raise EvaluationError(str(error)) from error
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read: {error}") from error


def _parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise EvaluationError(
            f"{file} needs pyarrow to be read: pip install 'diffa-audio[data]'"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise EvaluationError(f"{file} is no readable Parquet file: {error}") from error


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    parquet = _parquet(file)
    names = parquet.schema_arrow.names
    embedded = {
        name
        for name in AUDIO
        if name in names and not str(parquet.schema_arrow.field(name).type).endswith("string")
    }
    kept = [name for name in names if name not in embedded]
    for group in range(parquet.num_row_groups):
        yield from parquet.read_row_group(group, columns=kept).to_pylist()


def repeated(rows: Iterable[Row], column: str) -> list[tuple[int, str]]:
    """Rows whose id an earlier row has already: their numbers and what to say."""
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        if row.fields.get(column) is None:
            continue
        name = json.dumps(row.fields[column], sort_keys=True, default=str)
        if name in seen:
            found.append((row.number, f"repeats {column} {name} of row {seen[name]}"))
        seen.setdefault(name, row.number)
    return found


def as_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON lines, with the columns in the order they came in."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
