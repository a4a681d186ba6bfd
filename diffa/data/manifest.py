"""Manifests: DIFFA's published JSON list and JSONL, checked row by row and read lazily."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffa.data.samples import DataError, Fault, OnError, Sample, listed, seed_of
from diffa.errors import suggest

FIELDS = (
    "audio_filepath",
    "input",
    "target",
    "transcription",
    "duration",
    "seed_transcript",
    "dataset",
    "audio_id",
)


class Broken(str):
    """What is wrong with a row that is not even JSON."""

    __slots__ = ()


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
        self.path = Path(path).expanduser()
        check_form(self.path)
        if target not in FIELDS:
            raise DataError(f"{self.path}: rows have no field {target!r}{suggest(target, FIELDS)}")
        self.target, self.question, self.probe, self.unique = target, question, probe, unique
        self.pairs, self.questions = pairs, tuple(questions)
        self.folder = Path(folder).expanduser() if folder else self.path.parent
        self.faults: list[Fault] = []
        self._starts, self._ends = array("q"), array("q")
        self._rows, self._seconds = array("q"), array("d")
        self._scan()
        if self.faults and on_error == "stop":
            raise DataError(f"{self._count()}:\n{listed(self.faults)}")
        if not len(self):
            raise DataError(f"{self.path} has no usable row\n{listed(self.faults)}".rstrip())

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        return self.at(index, 0.0)

    def at(self, index: int, progress: float) -> Sample:
        """Return a row; which of several questions it asks follows from row and progress."""
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            row = json.loads(file.read(self._ends[index] - self._starts[index]))
        question = self.question or row.get("input") or ""
        if self.questions:
            question = self.questions[seed_of(index, str(progress)) % len(self.questions)]
        return Sample(
            target=row[self.target].strip(),
            question=question,
            audio=self._audio(row),
            spoken={"*": row["transcription"]} if row.get("transcription") else None,
            key=f"{self.path.name} row {self._rows[index]}",
            rejected=row["rejected"].strip() if self.pairs else None,
        )

    def seconds(self, index: int) -> float:
        """Duration of a row's audio; 0 where the row does not say and was not probed."""
        return self._seconds[index]

    def summary(self) -> str:
        """Say how many rows are used and how many are not, and why."""
        text = f"{self.path}: {len(self)} rows"
        return f"{text}; {self._count()}:\n{listed(self.faults)}" if self.faults else text

    def _count(self) -> str:
        return (
            f"{self.path}: {len(self.faults)} of {len(self) + len(self.faults)} rows are unusable"
        )

    def _audio(self, row: dict[str, Any]) -> Path:
        return self.folder / Path(row["audio_filepath"]).expanduser()

    def _scan(self) -> None:
        """Find where the usable rows are and what is wrong with the others."""
        seen: dict[str, int] = {}
        for number, (start, end, row) in enumerate(self._raw(), start=1):
            if isinstance(row, Broken):
                self.faults.append(Fault(number, str(row)))
                continue
            reason, seconds = self._check(row, seen, number)
            if reason:
                self.faults.append(Fault(number, reason))
                continue
            self._starts.append(start)
            self._ends.append(end)
            self._rows.append(number)
            self._seconds.append(seconds)

    def _raw(self) -> Iterator[tuple[int, int, Any]]:
        """Yield where each row begins and ends, and the row or what is wrong with its JSON."""
        try:
            data = self.path.read_bytes() if self.path.suffix == ".json" else None
            if data is not None:
                yield from list_items(data, str(self.path))
            else:
                with self.path.open("rb") as file:
                    yield from lines(file)
        except FileNotFoundError as error:
            raise DataError(f"there is no manifest {self.path}") from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error

    def _check(self, row: Any, seen: dict[str, int], number: int) -> tuple[str, float]:
        """Return what is wrong with a row (nothing: ``""``) and its duration in seconds."""
        if not isinstance(row, dict):
            return f"is {type(row).__name__}, not a mapping", 0.0
        if "messages" in row:
            return "is a conversation (messages): `diffa data convert` makes rows of it", 0.0
        name, answer, given = (row.get(k) for k in ("audio_filepath", self.target, "audio_id"))
        if not isinstance(name, str) or not name:
            return "has no audio_filepath", 0.0
        if not isinstance(answer, str) or not answer.strip():
            return f"has an empty answer ({self.target})", 0.0
        if self.pairs and (reason := _unpaired(row.get("rejected"), answer)):
            return reason, 0.0
        if given is not None:
            identity = json.dumps(given if self.unique else [given, row.get("input"), answer])
            if identity in seen:
                return f"repeats audio_id {given!r} of row {seen[identity]}", 0.0
            seen[identity] = number
        return self._check_audio(self._audio(row), row.get("duration"))

    def _check_audio(self, path: Path, duration: Any) -> tuple[str, float]:
        seconds = float(duration) if isinstance(duration, int | float) else 0.0
        if not path.is_file():
            return f"audio file {path} is missing", seconds
        if not self.probe:
            return "", seconds
        reason, found = probe(path)
        return reason, seconds or found


def _unpaired(rejected: Any, chosen: str) -> str:
    """Return what is wrong with a rejected answer; nothing: ``""``."""
    if not isinstance(rejected, str) or not rejected.strip():
        return "has no rejected answer"
    same = " ".join(rejected.split()) == " ".join(chosen.split())
    return "rejects the answer that it prefers" if same else ""


def probe(path: Path) -> tuple[str, float]:
    """Return what is wrong with an audio file's header (nothing: ``""``) and its seconds."""
    import soundfile

    if path.stat().st_size == 0:
        return f"audio file {path} is empty", 0.0
    try:
        found = soundfile.info(path)
    except soundfile.LibsndfileError:
        if path.suffix.lower() in (".m4a", ".mp4", ".aac", ".webm", ".opus", ".mka"):
            return "", 0.0  # PyAV's formats are opened only when they are read
        return f"audio file {path} is not readable audio", 0.0
    if not found.frames:
        return f"audio file {path} holds no samples", 0.0
    return "", found.frames / found.samplerate


def check_form(path: Path) -> None:
    """Raise DataError for a manifest that is not ``.json`` or ``.jsonl``."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path} is no .json or .jsonl manifest: `diffa data convert` makes one")


def lines(file: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield start, end and value of every line that is not blank; text says what is wrong."""
    start = 0
    for line in file:
        end = start + len(line)
        if line.strip():
            yield start, end, _parsed(line)
        start = end


def list_items(data: bytes, name: str) -> Iterator[tuple[int, int, Any]]:
    """Yield start, end (in bytes) and value of every item of a JSON list."""
    text = _decoded(data)
    if text is None:
        raise DataError(f"{name} is not UTF-8 text")
    decoder, plain = json.JSONDecoder(), len(text) == len(data)
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{name} is not a JSON list: it begins with {text[at : at + 20]!r}")
    at, offset, row = _skip(text, at + 1), 0, 0
    before = 0  # characters already counted in ``offset`` bytes
    while text[at : at + 1] != "]":
        row += 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            yield 0, 0, Broken(f"is broken JSON ({error}); nothing after it can be read")
            return
        if plain:
            yield at, end, value
        else:
            start = offset + len(text[before:at].encode())
            offset, before = start + len(text[at:end].encode()), end
            yield start, offset, value
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            found = repr(text[at : at + 12]) if text[at:] else "the end of the file"
            yield 0, 0, Broken(f"is expected after {found}, where ',' or ']' should be")
            return


def _parsed(line: bytes) -> Any:
    text = _decoded(line)
    if text is None:
        return Broken("is not UTF-8 text")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return Broken(f"is broken JSON: {error}")


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
