"""Batches of items of similar audio length, within a memory budget; the same on every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffa.evaluation.items import Question


class BatchRow(NamedTuple):
    """A row of a batch: the item's number, its question, and its audio's length in seconds."""

    number: int
    question: Question
    seconds: float


def make_batches(
    rows: Sequence[BatchRow], *, batch_size: int, batch_seconds: float
) -> list[list[BatchRow]]:
    """Split rows into batches, longest audio first.

    Args:
        rows: Rows to be answered.
        batch_size: Maximum number of rows per batch.
        batch_seconds: Maximum seconds of audio per batch, padding included. Because the longest
            audio comes first, memory is exceeded in the first batch or never.

    Returns:
        Batches whose rows share every option of their questions except the text.
    """
    order = sorted(rows, key=lambda row: (_options(row), -row.seconds, row.number))
    batches: list[list[BatchRow]] = []
    for row in order:
        last = batches[-1] if batches else []
        fits = (
            0 < len(last) < batch_size
            and _options(last[0]) == _options(row)
            and (len(last) + 1) * last[0].seconds <= batch_seconds
        )
        if fits:
            last.append(row)
        else:
            batches.append([row])
    return batches


def unfinished_batches(
    batches: Sequence[list[BatchRow]], done: Mapping[int, object]
) -> list[list[BatchRow]]:
    """Return the batches with an unanswered row."""
    # Run them whole: rounding depends on the rows that share a batch.
    return [batch for batch in batches if any(row.number not in done for row in batch)]


def _options(row: BatchRow) -> tuple[int, int, str, bool]:
    question = row.question
    return question.max_tokens, question.block_length or 0, question.system or "", question.trim
