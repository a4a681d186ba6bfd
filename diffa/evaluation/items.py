"""The values of an evaluation: a benchmark's item, the question about it, and its score."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from diffa.errors import DiffaError

Fields = Mapping[str, Any]
Mode = Literal["generate", "likelihood"]


class EvaluationError(DiffaError):
    """An evaluation cannot be run, resumed or scored: says which file or option, and why."""


class Item(NamedTuple):
    """One row of a benchmark's file.

    Attributes:
        number: Counted from 1 over all files of the benchmark.
        fields: Columns without embedded audio; empty if the row cannot be read.
        fault: What is wrong with the row. The item is not asked and counts as wrong.
        file: Name of the file that holds the row.
    """

    number: int
    fields: dict[str, Any]
    fault: str = ""
    file: str = ""


class Question(NamedTuple):
    """What a model is asked about an item's audio.

    Attributes:
        text: User text; empty if the audio holds the whole question.
        choices: Answers to rank by likelihood in ``likelihood`` mode.
        max_tokens: Answer length. Default of a suite: the papers' length.
        block_length: Block length of the sampler. None: as in the spec.
        system: System prompt. None: as in the spec.
        trim: Whether the chat template may strip whitespace around the text.
    """

    text: str
    choices: tuple[str, ...] = ()
    max_tokens: int = 16
    block_length: int | None = None
    system: str | None = None
    trim: bool = True


class ItemScore(NamedTuple):
    """What one parser makes of one response. A metric is sum(numerator) / sum(denominator).

    Attributes:
        answer: The answer that the parser finds; None if it finds none.
        numerator: 1 for a right answer, the errors of a transcript, or a judge's points.
        denominator: 1, the words of a reference, or 0 if the official script excludes the item.
        is_random: Whether the official script chose the answer at random.
        counts: Further counts that a suite sums, such as kinds of errors.
    """

    answer: str | None
    numerator: float
    denominator: float = 1.0
    is_random: bool = False
    counts: tuple[float, ...] = ()


ItemScores = dict[str, ItemScore]
"""Scores by parser: ``official``, ``fixed``, and what a suite adds."""


class Suite:
    """A benchmark: its questions, and how its official script and the fixed parser score answers.

    Subclasses set the attributes and define ``find_fault``, ``question`` and ``score``.

    Attributes:
        name: Name on the command line.
        response_column: Column that holds responses in the official format.
        prompts: Ids of the prompts; the first is the default.
        parsers: Id of each parser that ``score`` applies.
        groups: Columns, or tuples of columns, by which scores are broken down.
        metric: Name of numerator / denominator: accuracy, wer or score.
        subset: Part of the benchmark; empty if it has none.
        needs_judge: Whether a judge has to read responses before they are scored.
    """

    name: str
    response_column: str
    prompts: tuple[str, ...]
    parsers: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...] = ()
    metric: str = "accuracy"
    subset: str = ""
    needs_judge: bool = False

    def find_fault(self, fields: Fields) -> str:
        """Return what an item lacks to be asked or scored; ``""`` if nothing."""
        raise NotImplementedError

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return the question about an item with the prompt of an id."""
        raise NotImplementedError

    def score(self, fields: Fields, rng: random.Random) -> ItemScores:
        """Score the response of an item; ``rng`` feeds the official scripts' random fallbacks."""
        raise NotImplementedError

    def answered_fields(self, fields: Fields, response: str, prompt: str) -> dict[str, Any]:
        """Return an item's columns with a response to the prompt of an id."""
        return {**fields, self.response_column: response}

    def score_missing(self, fields: Fields) -> ItemScores:
        """Return the scores of an item that cannot be asked or read: wrong for every parser."""
        return {name: ItemScore(None, 0.0) for name in self.parsers}

    def extra_metrics(self, parser: str, scores: Sequence[ItemScore]) -> dict[str, Any]:
        """Return what the report says of a parser besides the metric."""
        return {}

    def export(self, items: Sequence[Item], stem: str) -> dict[str, str]:
        """Return the files that the official script reads, by name. Default: JSONL."""
        return {f"{stem}.jsonl": to_jsonl([item.fields for item in items])}


def as_text(value: Any) -> str:
    """Return a response as text; None becomes the empty text."""
    return "" if value is None else str(value)


def to_jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as JSON lines; columns keep their order."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
