"""The rows of a manifest that ``diffa map`` answers: recordings and questions, no targets."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from diffa.data.fields import field_fault
from diffa.data.manifest import check_manifest_suffix
from diffa.data.samples import DataError
from diffa.data.tables import BrokenRow, RowIndex, iter_spans
from diffa.runtime.files import expand


class QuestionRow(NamedTuple):
    """One recording and its question.

    Attributes:
        number: Counted from 0.
        audio: Path as the manifest writes it.
        path: Path of the recording.
        audio_id: Id of the recording; empty if the manifest has none.
        question: Text of the question.
        fault: What is wrong with the row; empty if nothing.
    """

    number: int
    audio: str = ""
    path: Path = Path()
    audio_id: str = ""
    question: str = ""
    fault: str = ""


class QuestionManifest:
    """Rows of a ``.json`` list or a ``.jsonl`` file. Only their positions are kept in memory.

    Args:
        path: The manifest, with ``audio_filepath`` and optionally ``audio_id`` and ``input``.
        question: Question about every recording. Default: each row's ``input``.
        folder: Folder of relative audio paths. Default: the manifest's own folder.

    Raises:
        DataError: The manifest cannot be read, or holds no row.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        question: str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = expand(path)
        check_manifest_suffix(self.path)
        self.question = question
        self.folder = expand(folder) if folder else self.path.parent
        self._rows = RowIndex(self.path)
        for span in iter_spans(self.path):
            self._rows.append(span)
        with self.path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not len(self):
            raise DataError(f"{self.path} has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, first: int, end: int) -> list[QuestionRow]:
        """Return rows ``first`` to ``end`` (exclusive)."""
        return [self._parse(n, row) for n, row in enumerate(self._rows.read(first, end), first)]

    def _parse(self, number: int, row: Any) -> QuestionRow:
        if isinstance(row, BrokenRow):
            return QuestionRow(number, fault=str(row))
        if fault := field_fault(row):
            return QuestionRow(number, fault=fault)
        audio, audio_id = row.get("audio_filepath"), row.get("audio_id")
        question, fault = self.question or row.get("input") or "", ""
        if not audio:
            audio, fault = "", "has no audio_filepath"
        if not question.strip():
            question = ""
            fault = fault or "has no question (input), and --question is not given"
        path = self.folder / expand(audio)
        audio_id = "" if audio_id is None else str(audio_id)
        return QuestionRow(number, audio, path, audio_id, question, fault)
