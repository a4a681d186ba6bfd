"""The values of an evaluation: a row, what is asked about it, and how an answer is read."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from diffa.errors import DiffaError

Fields = Mapping[str, Any]


class EvaluationError(DiffaError):
    """An evaluation cannot be run, resumed or scored: says which file or setting, and why."""


class Row(NamedTuple):
    """One row of a benchmark's file.

    Attributes:
        number: counted from 1 over all files of the benchmark.
        fields: its columns, audio that is embedded left out; empty where it cannot be read.
        fault: what is wrong with it; it is asked nothing and counts as wrong. Empty if sound.
        file: the name of the file it comes from.
    """

    number: int
    fields: dict[str, Any]
    fault: str = ""
    file: str = ""


class Question(NamedTuple):
    """What a model is asked about a row's audio.

    Attributes:
        text: the user's words; empty where the audio says everything.
        choices: answers whose likelihoods can be compared instead of generating one.
        max_tokens: length of the answer (the papers' settings).
        block_length: Answer tokens per block, for samplers that have blocks. None: the spec's.
        system: instead of the spec's system turn.
    """

    text: str
    choices: tuple[str, ...] = ()
    max_tokens: int = 16
    block_length: int | None = None
    system: str | None = None


class Reading(NamedTuple):
    """How one parser reads one answer.

    Attributes:
        answer: what it takes the answer to be; None where it finds none.
        hits: what the answer earns: 1 if right, errors for a transcript, a judge's points.
        of: its share of the denominator: 1, words of a reference, or 0 where the official
            script leaves the row out.
        guessed: whether the answer is a random fallback.
        parts: further counts that a suite adds up, such as kinds of errors.
    """

    answer: str | None
    hits: float
    of: float = 1.0
    guessed: bool = False
    parts: tuple[float, ...] = ()


Readings = dict[str, Reading]
"""Readings by parser: ``official`` and ``fixed``, and what a suite adds."""


class Suite(Protocol):
    """A benchmark: what it asks, and how its official script and ours read answers.

    Attributes:
        name: as the command line says it.
        key: the column that holds predictions in the official format.
        prompts: ids of its prompts, the default first.
        parsers: ids of what ``read`` returns.
        groups: columns, or tuples of them, by which scores are broken down.
        metric: what ``hits / of`` is called.
        lower: whether less of it is better.
    """

    name: str
    key: str
    prompts: tuple[str, ...]
    parsers: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]
    metric: str
    lower: bool

    def check(self, fields: Fields) -> str:
        """Return what a row lacks to be asked or scored; nothing: ``""``."""
        ...

    def ask(self, fields: Fields, prompt: str) -> Question:
        """Return the question of a row under a prompt's id."""
        ...

    def read(self, fields: Fields, draw: random.Random) -> Readings:
        """Read the prediction in ``fields[key]``; ``draw`` feeds official random guesses."""
        ...

    def missed(self, fields: Fields) -> Readings:
        """What a row counts for that could not be asked or cannot be read: all of it wrong."""
        ...

    def summary(self, parser: str, readings: Sequence[Reading]) -> dict[str, Any]:
        """Return what a suite reports of a parser besides ``hits / of``."""
        ...

    def export(self, rows: Sequence[Row], stem: str) -> dict[str, str]:
        """Return the texts of the files that official scripts read, by name."""
        ...


def text_of(value: Any) -> str:
    """A prediction as text: None and what is missing are empty."""
    return "" if value is None else str(value)
