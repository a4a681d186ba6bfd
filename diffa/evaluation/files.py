"""A benchmark's files: JSON, JSONL and Parquet, with audio beside them or inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffa.data.samples import DataError
from diffa.data.tables import TABLE_SUFFIXES, BrokenRow, iter_rows, open_parquet
from diffa.errors import AudioError
from diffa.evaluation.items import EvaluationError, Item
from diffa.runtime.files import expand

AUDIO_COLUMNS = (
    "audio", "audio_path", "audio_filepath", "context", "wav", "audio_file", "audio_id",
)  # fmt: skip
"""Columns that may hold an item's audio; the first one that does is taken."""


class BenchmarkData:
    """The items of a benchmark's files. Embedded audio is read only on request.

    Args:
        path: A file, or a folder: all of its JSON, JSONL or Parquet files, in order of names.
        audio_folder: Folder of relative audio paths. Default: each file's own folder.

    Raises:
        EvaluationError: There is no such file, or no row in it.
    """

    def __init__(self, path: str | Path, audio_folder: str | Path | None = None) -> None:
        self.path = expand(path)
        self.audio_folder = expand(audio_folder) if audio_folder else None
        self.items: list[Item] = []
        self._places: list[tuple[Path, int]] = []  # each item's file, and its row there
        # The last row group's audio: a Parquet file gives no access to single rows.
        self._row_group: tuple[Path, int, list[Any]] | None = None
        files = _list_files(self.path)
        for file in files:
            for index, row in enumerate(_read_rows(file, alone=len(files) == 1)):
                fields = row if isinstance(row, dict) else {}
                fault = str(row) if isinstance(row, BrokenRow) else f"is {type(row).__name__}"
                number = len(self.items) + 1
                self.items.append(Item(number, fields, "" if row is fields else fault, file.name))
                self._places.append((file, index))
        if not self.items:
            raise EvaluationError(f"{self.path} has no rows")

    def audio(self, number: int) -> tuple[Any, int]:
        """Return the waveform (S,) of an item and its sample rate; raises AudioError."""
        from diffa.audio import read_dataset_audio

        return read_dataset_audio(self._stored_audio(number), self._folder(number))

    def duration(self, number: int) -> float:
        """Return the seconds of an item's audio by its header; 0 if the header does not say."""
        from diffa.audio import probe

        try:
            audio = self._stored_audio(number)
            if isinstance(audio, dict) and audio.get("array") is not None:
                return len(audio["array"]) / float(audio["sampling_rate"])
            if isinstance(audio, dict):
                audio = audio.get("bytes") or audio.get("path")
            if isinstance(audio, str):
                audio = self._folder(number) / expand(audio)
            return probe(audio).seconds
        except Exception:  # audio() raises the error when the item is asked
            return 0.0

    def _folder(self, number: int) -> Path:
        return self.audio_folder or self._places[number - 1][0].parent

    def _stored_audio(self, number: int) -> Any:
        """Return what the file holds for an item: a path, bytes, or a mapping of ``datasets``."""
        file, index = self._places[number - 1]
        if file.suffix == ".parquet":
            return self._embedded_audio(file, index)
        fields = self.items[number - 1].fields
        for column in AUDIO_COLUMNS:
            if fields.get(column):
                return fields[column]
        raise AudioError(f"has no audio: none of the columns {', '.join(AUDIO_COLUMNS)}")

    def _embedded_audio(self, file: Path, index: int) -> Any:
        parquet = open_parquet(file)
        columns = [name for name in AUDIO_COLUMNS if name in parquet.schema_arrow.names]
        if not columns:
            raise AudioError(f"has no audio: none of the columns {', '.join(AUDIO_COLUMNS)}")
        start = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if index < start + count:
                if self._row_group is None or self._row_group[:2] != (file, group):
                    table = parquet.read_row_group(group, columns=columns[:1])
                    self._row_group = (file, group, table.column(0).to_pylist())
                return self._row_group[2][index - start]
            start += count
        raise AudioError(f"{file} has no row {index}")


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in TABLE_SUFFIXES:
            raise EvaluationError(f"{path}: files end in {', '.join(TABLE_SUFFIXES)}")
        return [path]
    files = sorted(file for suffix in TABLE_SUFFIXES for file in path.rglob(f"*{suffix}"))
    if not files:
        if not path.is_dir():
            raise EvaluationError(f"there is no file or folder {path}")
        raise EvaluationError(f"{path} holds no {', '.join(TABLE_SUFFIXES)} file")
    if len({file.suffix for file in files}) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in files[:6])
        raise EvaluationError(f"{path} holds files of several kinds ({names}): name one of them")
    return files


def _read_rows(file: Path, *, alone: bool) -> Iterator[Any]:
    """Yield every row of a file, or a BrokenRow that says what is wrong with it.

    Among several files, one that cannot be opened becomes one broken row; alone it is an error.
    """
    try:
        yield from iter_rows(file, omit=_embedded_columns(file))
    except DataError as error:
        if alone:
            raise EvaluationError(str(error)) from error
        yield BrokenRow(f"stands for a file: {error}")


def _embedded_columns(file: Path) -> list[str]:
    """Return the columns of a Parquet file that hold audio itself, not paths."""
    if file.suffix != ".parquet":
        return []
    schema = open_parquet(file).schema_arrow
    present = [name for name in AUDIO_COLUMNS if name in schema.names]
    return [name for name in present if not str(schema.field(name).type).endswith("string")]
