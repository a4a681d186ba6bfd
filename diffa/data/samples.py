"""One sample, what a source of samples must offer, and what can be wrong with a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from diffa.errors import DiffaError

if TYPE_CHECKING:
    from torch import Tensor

OnError = Literal["skip", "stop"]


class DataError(DiffaError):
    """Training data is missing, malformed or unreadable; says which rows and why."""


class Sample(NamedTuple):
    """What one row teaches.

    Attributes:
        target: the answer to learn.
        question: the user's question; the prompt's template goes around it.
        audio: a file, or a waveform (S,) with its ``rate``; None for text alone.
        rate: samples per second of a waveform.
        script: text that stands where the audio would (language models learn from it).
        spoken_from: how many words of the script come before those that are spoken.
        spoken: what adapters should say by CTC, by adapter key; ``*`` for any other.
        key: names the row in messages.
        labels: whatever else a stage learns from (an encoder's heads).
        more: further questions about the same audio, each with its answer.
        rejected: an answer to move away from; ``target`` is preferred to it.
    """

    target: str = ""
    question: str = ""
    audio: Path | Tensor | None = None
    rate: int | None = None
    script: str | None = None
    spoken_from: int = 0
    spoken: Mapping[str, str] | None = None
    key: str = ""
    labels: Any = None
    more: tuple[tuple[str, str], ...] = ()
    rejected: str | None = None


class Source(Protocol):
    """Random access to samples; ``source[i]`` must depend on ``i`` alone.

    A source may also offer ``seconds(i) -> float`` (for grouping by length) and
    ``at(i, progress) -> Sample`` with progress from 0 to 1 over the stage (for curricula).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Fault(NamedTuple):
    """A row that cannot be used: its number (from 1, as an editor counts), and why."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


def listed(faults: list[Fault], shown: int = 20) -> str:
    """Return faults one per line, the first ``shown`` of them."""
    lines = [f"  {fault}" for fault in faults[:shown]]
    if len(faults) > shown:
        lines.append(f"  and {len(faults) - shown} more")
    return "\n".join(lines)


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
