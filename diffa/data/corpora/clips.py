"""One utterance of a published corpus with what its labels say, and how readers report faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ATTRIBUTES = (
    "gender",
    "age",
    "accent",
    "emotion",
    "pitch",
    "volume",
    "speed",
    "duration",
    "intent",
    "text",
)
"""The ten attributes of DIFFA's stage-2 data; pitch, volume and speed are measured, the duration
is read, the rest comes from labels."""

GENDERS = {"m": "male", "male": "male", "f": "female", "female": "female"}


class Clip(NamedTuple):
    """One recording and what its corpus says of it.

    Attributes:
        path: The recording's file.
        audio_id: An id, unique in its corpus.
        dataset: The corpus's title.
        transcription: What is said; empty if the corpus has no transcript.
        speaker: The speaker's id, unique in its corpus; empty if unknown.
        split: The corpus's own part that the recording belongs to; empty if there are none.
        labels: Attributes that the corpus labels, by name (``ATTRIBUTES``).
        transcribed_by: The model that wrote the transcription; empty if the corpus has it.
    """

    path: Path
    audio_id: str
    dataset: str
    transcription: str = ""
    speaker: str = ""
    split: str = ""
    labels: Mapping[str, str] = {}
    transcribed_by: str = ""


ClipReader = Callable[[Path, list[str]], Iterator[Clip]]
"""Yields the clips below a folder and appends what is wrong with it to the list."""


def clean_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Leave out labels that say nothing; genders are written alike everywhere."""
    cleaned = {name: value.strip() for name, value in labels.items() if value and value.strip()}
    if "gender" in cleaned:
        cleaned["gender"] = GENDERS.get(cleaned["gender"].lower(), cleaned["gender"].lower())
    return cleaned


def subfolder(root: Path, name: str) -> Path:
    """Return ``root/name`` or, where ``root`` is that folder already, ``root`` itself."""
    return root / name if (root / name).is_dir() else root


def find_file(root: Path, name: str) -> Path | None:
    """Find a file that a corpus keeps at its top: in ``root``, one below it, or one above it."""
    below = sorted(root.glob(f"*/{name}"))
    return next((p for p in (root / name, *below, root.parent / name) if p.is_file()), None)


def read_table(path: Path) -> str:
    """Return the text of a transcript or table; bytes that are not UTF-8 are read as Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")
