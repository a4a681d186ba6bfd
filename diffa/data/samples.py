"""One sample, what a source of samples must offer, and what can be wrong with a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from diffa.errors import DiffaError

if TYPE_CHECKING:
    from torch import Tensor

OnError = Literal["skip", "stop"]

ManifestRow = dict[str, Any]
"""A row of a manifest: the fields of ``diffa.data.formats``."""


class DataError(DiffaError):
    """Training data is missing, malformed or unreadable; says which rows and why."""


class Sample(NamedTuple):
    """What one row of training data teaches.

    Attributes:
        target: The answer to learn.
        question: The user's question, without the prompt's template.
        audio: A file, or a waveform (S,) with its ``rate``; None for text alone.
        rate: Samples per second of a waveform.
        audio_text: Words that stand where the audio would; language models learn from it.
        speech_start: How many words of ``audio_text`` come before the transcript.
        ctc_targets: Transcript of an adapter's CTC loss, by adapter key; ``*`` for any other.
        key: Names the row in messages.
        labels: Whatever else a stage learns from (an encoder's heads).
        extra_questions: Further questions about the same audio, each with its answer.
        rejected: An answer to move away from; ``target`` is preferred to it.
    """

    target: str = ""
    question: str = ""
    audio: Path | Tensor | None = None
    rate: int | None = None
    audio_text: str | None = None
    speech_start: int = 0
    ctc_targets: Mapping[str, str] | None = None
    key: str = ""
    labels: Any = None
    extra_questions: tuple[tuple[str, str], ...] = ()
    rejected: str | None = None


class Source(Protocol):
    """Random access to samples; ``source[i]`` must depend on ``i`` alone.

    A source may also be a TimedSource, a CurriculumSource, a SpeakerSource or a CheckedSource:
    it has the member that the protocol names, nothing else declares it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class TimedSource(Protocol):
    """A source that knows durations without reading audio; they group samples by length."""

    def seconds(self, index: int) -> float:
        """Return the duration of sample ``index`` in seconds; an estimate is enough."""
        ...


@runtime_checkable
class CurriculumSource(Protocol):
    """A source whose samples depend on how far the stage is."""

    def at(self, index: int, progress: float) -> Sample:
        """Return sample ``index`` at ``progress``, from 0 at the stage's start to 1."""
        ...


@runtime_checkable
class SpeakerSource(Protocol):
    """A source that names every speaker of its samples."""

    speakers: Sequence[str]


@runtime_checkable
class CheckedSource(Protocol):
    """A source that has left unusable rows of a file out and says which."""

    path: Path
    faults: Sequence[Fault]


class Fault(NamedTuple):
    """A row that cannot be used: its number (from 1, as an editor counts), and why."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


def format_faults(faults: list[Fault], limit: int = 20) -> str:
    """Return faults one per line, the first ``limit`` of them."""
    lines = [f"  {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        lines.append(f"  and {len(faults) - limit} more")
    return "\n".join(lines)


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
