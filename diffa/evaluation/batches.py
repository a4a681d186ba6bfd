"""Batches of rows of similar length, within a memory budget; the same on every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffa.evaluation.items import Question


class Clip(NamedTuple):
    """A row to be asked: its number, its question, and its audio's length in seconds."""

    number: int
    question: Question
    seconds: float


def batches(clips: Sequence[Clip], *, most: int, budget: float) -> list[list[Clip]]:
    """Split rows into batches of at most ``most``, long audio first.

    A batch holds at most ``budget`` seconds of audio, padding counted, so that the longest
    batch fits wherever the first did; and only rows that are answered in one way.
    """
    order = sorted(clips, key=lambda clip: (_settings(clip), -clip.seconds, clip.number))
    made: list[list[Clip]] = []
    for clip in order:
        last = made[-1] if made else []
        fits = (
            0 < len(last) < most
            and _settings(last[0]) == _settings(clip)
            and (len(last) + 1) * last[0].seconds <= budget
        )
        if fits:
            last.append(clip)
        else:
            made.append([clip])
    return made


def mine(batches: Sequence[list[Clip]], rank: int, world: int) -> list[list[Clip]]:
    """Every ``world``-th batch from ``rank`` on: batches of alike cost go to each process."""
    return list(batches[rank::world])


def pending(batches: Sequence[list[Clip]], done: Mapping[int, object]) -> list[list[Clip]]:
    """Batches with a row that is not done; they are run whole, so that rounding repeats."""
    return [batch for batch in batches if any(clip.number not in done for clip in batch)]


def _settings(clip: Clip) -> tuple[int, int, str]:
    asked = clip.question
    return asked.max_tokens, asked.block_length or 0, asked.system or ""
