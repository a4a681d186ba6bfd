"""The rows of a manifest that are to be answered: recordings and questions, targets not needed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from diffa.data.manifest import check_form
from diffa.data.samples import DataError
from diffa.data.tables import BrokenRow, RowIndex, iter_spans


class Row(NamedTuple):
    """One row: its number from 0, recording, question, and what is wrong with it (or nothing).

    ``audio`` is written as in the manifest, ``path`` says where it is.
    """

    number: int
    audio: str
    path: Path
    name: str
    question: str
    fault: str


class Asking:
    """Rows of a ``.json`` list or a ``.jsonl`` manifest; where each begins is kept, not more.

    Args:
        path: the manifest; ``audio_filepath`` is needed, ``audio_id`` and ``input`` are used.
        question: asked of every row; each row's ``input`` where None.
        folder: where relative audio paths start; the manifest's own folder where None.

    Raises:
        DataError: the manifest cannot be read, or holds no row.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, question: str | None, folder: str | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        check_form(self.path)
        self.question = question
        self.folder = Path(folder).expanduser() if folder else self.path.parent
        self._rows = RowIndex(self.path)
        for span in iter_spans(self.path):
            self._rows.append(span)
        self.digest = _digest(self.path)
        if not len(self):
            raise DataError(f"{self.path} has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, first: int, end: int) -> list[Row]:
        """Rows ``first`` to before ``end``."""
        return [self._row(n, row) for n, row in enumerate(self._rows.read(first, end), first)]

    def _row(self, number: int, found: Any) -> Row:
        if isinstance(found, BrokenRow):
            return Row(number, "", Path(), "", "", str(found))
        if not isinstance(found, dict):
            return Row(number, "", Path(), "", "", f"is {type(found).__name__}, not a mapping")
        audio, name = found.get("audio_filepath"), found.get("audio_id")
        asked = self.question or found.get("input")
        fault = ""
        if not isinstance(audio, str) or not audio:
            audio, fault = "", "has no audio_filepath"
        if not isinstance(asked, str) or not asked.strip():
            asked, fault = "", fault or "has no question (input), and --question is not given"
        place = self.folder / Path(audio).expanduser()
        return Row(number, audio, place, "" if name is None else str(name), asked, fault)


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
