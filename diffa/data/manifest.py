"""Manifests: DIFFA's published JSON list and JSONL, checked row by row and read lazily."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffa.audio import probe, read
from diffa.data.fields import field_fault
from diffa.data.formats import MANIFEST_FIELDS
from diffa.data.samples import DataError, Fault, OnError, Sample, derive_seed, format_faults
from diffa.data.tables import BrokenRow, RowIndex, iter_spans
from diffa.errors import AudioError, suggest
from diffa.runtime.files import expand


class Manifest:
    """Rows of a manifest as samples. Only where each row begins is kept in memory.

    Args:
        path: ``.json`` (a list, as DIFFA publishes) or ``.jsonl``.
        target: the field that holds the answer (``transcription`` in DIFFA's stage 1).
        question: asked of every row; each row's ``input`` where None.
        folder: where relative audio paths start; the manifest's own folder where None.
        on_error: ``skip`` leaves faulty rows out and lists them in ``faults``; ``stop`` raises.
        probe: open every audio file's header; finds unreadable files now and missing durations.
        unique: a second row of one ``audio_id`` is a fault; else only one that asks the same.
        pairs: every row needs a ``rejected`` answer that differs from the target (DIFFA-2's
            preference rows, whose ``chosen`` is not read: the target is what is chosen).
        questions: asked in place of ``question``, one drawn for each row and epoch.

    Raises:
        DataError: the file ends otherwise or cannot be read, no row is usable, or a row is not
            and ``stop``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target: str = "target",
        question: str | None = None,
        folder: str | None = None,
        on_error: OnError = "stop",
        probe: bool = True,
        unique: bool = True,
        pairs: bool = False,
        questions: Sequence[str] = (),
    ) -> None:
        self.path = expand(path)
        check_manifest_suffix(self.path)
        if target not in MANIFEST_FIELDS:
            raise DataError(
                f"{self.path}: rows have no field {target!r}{suggest(target, MANIFEST_FIELDS)}"
            )
        self.target, self.question, self.probe, self.unique = target, question, probe, unique
        self.pairs, self.questions = pairs, tuple(questions)
        self.folder = expand(folder) if folder else self.path.parent
        self.faults: list[Fault] = []
        self._rows, self._numbers, self._seconds = RowIndex(self.path), array("q"), array("d")
        self._scan()
        if self.faults and on_error == "stop":
            raise DataError(f"{self._count()}:\n{format_faults(self.faults)}")
        if not len(self):
            raise DataError(f"{self.path} has no usable row\n{format_faults(self.faults)}".rstrip())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self.at(index, 0.0)

    def at(self, index: int, progress: float) -> Sample:
        """Return a row; which of several questions it asks follows from row and progress."""
        row = self._rows[index]
        question = self.question or row.get("input") or ""
        if self.questions:
            question = self.questions[derive_seed(index, str(progress)) % len(self.questions)]
        return Sample(
            target=row[self.target].strip(),
            question=question,
            audio=self._audio(row),
            ctc_targets={"*": row["transcription"]} if row.get("transcription") else None,
            key=f"{self.path.name} row {self._numbers[index]}",
            rejected=row["rejected"].strip() if self.pairs else None,
        )

    def seconds(self, index: int) -> float:
        """Duration of a row's audio; 0 where the row does not say and was not probed."""
        return self._seconds[index]

    def summary(self) -> str:
        """Say how many rows are used and how many are not, and why."""
        text = f"{self.path}: {len(self)} rows"
        return f"{text}; {self._count()}:\n{format_faults(self.faults)}" if self.faults else text

    def _count(self) -> str:
        return (
            f"{self.path}: {len(self.faults)} of {len(self) + len(self.faults)} rows are unusable"
        )

    def _audio(self, row: dict[str, Any]) -> Path:
        return self.folder / expand(row["audio_filepath"])

    def _scan(self) -> None:
        """Find where the usable rows are and what is wrong with the others."""
        first_rows: dict[str, int] = {}
        for number, span in enumerate(iter_spans(self.path), start=1):
            reason, seconds = self._check(span.value, first_rows, number)
            if reason:
                self.faults.append(Fault(number, reason))
                continue
            self._rows.append(span)
            self._numbers.append(number)
            self._seconds.append(seconds)

    def _check(self, row: Any, first_rows: dict[str, int], number: int) -> tuple[str, float]:
        """Return what is wrong with a row (nothing: ``""``) and its duration in seconds."""
        if isinstance(row, BrokenRow):
            return str(row), 0.0
        if fault := field_fault(row):
            return fault, 0.0
        if "messages" in row:
            return "is a conversation (messages): `diffa data convert` makes rows of it", 0.0
        name, answer, audio_id = (row.get(k) for k in ("audio_filepath", self.target, "audio_id"))
        if not name:
            return "has no audio_filepath", 0.0
        if not isinstance(answer, str) or not answer.strip():
            return f"has an empty answer ({self.target})", 0.0
        if self.pairs and (reason := _unpaired(row.get("rejected"), answer)):
            return reason, 0.0
        if audio_id is not None:
            key = json.dumps(audio_id if self.unique else [audio_id, row.get("input"), answer])
            if key in first_rows:
                return f"repeats audio_id {audio_id!r} of row {first_rows[key]}", 0.0
            first_rows[key] = number
        return self._check_audio(self._audio(row), row.get("duration"))

    def _check_audio(self, path: Path, duration: Any) -> tuple[str, float]:
        seconds = float(duration) if isinstance(duration, int | float) else 0.0
        if not path.is_file():
            return f"audio file {path} is missing", seconds
        if not self.probe:
            return "", seconds
        reason, measured = probe_audio(path)
        return reason, seconds or measured


def _unpaired(rejected: Any, answer: str) -> str:
    """Return what is wrong with a rejected answer; nothing: ``""``."""
    if not isinstance(rejected, str) or not rejected.strip():
        return "has no rejected answer"
    same = " ".join(rejected.split()) == " ".join(answer.split())
    return "rejects the answer that it prefers" if same else ""


def probe_audio(path: Path, *, decode: bool = False) -> tuple[str, float]:
    """Return what is wrong with an audio file (nothing: ``""``) and its seconds.

    Args:
        path: The file.
        decode: Decode it as training does. Otherwise its header alone is read.
    """
    if not decode:
        header = probe(path)
        return _named(header.fault, path), header.seconds
    try:
        waveform, rate = read(path, strict=True)
    except AudioError as error:
        return _named(str(error), path), 0.0
    return "", len(waveform) / rate


def _named(fault: str, path: Path) -> str:
    return fault if not fault or str(path) in fault else f"audio file {path} {fault}"


def check_manifest_suffix(path: Path) -> None:
    """Raise DataError for a manifest that is not ``.json`` or ``.jsonl``."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path} is no .json or .jsonl manifest: `diffa data convert` makes one")
