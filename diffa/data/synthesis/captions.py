"""Answers written by a language model from what a row says of its recording, and their checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from diffa.data.samples import Fault, ManifestRow
from diffa.data.synthesis.writers import Conversation, Writer, conversation, write_all

CAPTION_PROMPT = (
    "You answer questions about short recordings. Instead of the sound you are given notes on it: "
    "the time, what is said, and in brackets how it sounds. Answer as somebody who has listened "
    "to the recording, in fluent sentences. Say what the notes support and nothing beyond them. "
    "Never mention the notes, time stamps or brackets."
)
REWRITE_PROMPT = (
    "You rewrite answers in your own words. Keep every fact, add none, and keep about the length. "
    "Reply with the new answer alone."
)

_FORBIDDEN = (
    (re.compile(r"\[\d\d:\d\d"), "repeats a time stamp"),
    (re.compile(r"\b(?:the|these|your|provided|given) (?:notes|description|metadata)\b", re.I),
     "speaks of its notes"),
    (re.compile(r"\b(?:cannot|can't|unable to) (?:hear|listen|access|process)\b", re.I),
     "says that it cannot hear"),
    (re.compile(r"\bas an? (?:AI|(?:large )?language model|text)", re.I),
     "speaks of being a language model"),
    (re.compile(r"</?think>"), "holds unfinished thoughts"),
)  # fmt: skip


def caption_turns(row: ManifestRow, question: str) -> Conversation:
    """Ask a language model what a recording sounds like, given its bracketed line."""
    return conversation(f"Notes: {row['seed_transcript']}\n\nQuestion: {question}", CAPTION_PROMPT)


def rewrite_turns(row: ManifestRow) -> Conversation:
    """Ask a language model for a row's answer in its own words."""
    return conversation(f"Question: {row['input']}\nAnswer: {row['target']}", REWRITE_PROMPT)


def strip_thinking(text: str) -> str:
    """Cut off what reasoning models think before they answer."""
    return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()


def answer_fault(text: str) -> str:
    """Return why an answer cannot be one of somebody who listened; nothing where it can."""
    if not text.strip():
        return "is empty"
    return next((reason for pattern, reason in _FORBIDDEN if pattern.search(text)), "")


def answer_rows(
    rows: Sequence[ManifestRow],
    writer: Writer,
    turns: Callable[[ManifestRow], Conversation],
    faults: list[Fault],
    needs: Sequence[str] = (),
) -> list[ManifestRow]:
    """Return rows with the writer's answers; rows without a usable one are listed in ``faults``.

    Args:
        needs: fields that ``turns`` reads; a row in which one is empty is not asked about.

    Raises:
        DataError: the writer as a whole fails.
    """
    answered: list[ManifestRow] = []
    askable: list[tuple[int, ManifestRow]] = []
    for number, row in enumerate(rows, start=1):
        absent = [name for name in needs if not str(row.get(name) or "").strip()]
        if absent:
            faults.append(Fault(number, f"has no {' and no '.join(absent)} to write from"))
        else:
            askable.append((number, row))
    replies = write_all(writer, [turns(row) for _, row in askable])
    for (number, row), reply in zip(askable, replies, strict=True):
        text = strip_thinking(reply.text)
        reason = reply.fault or answer_fault(text)
        if reason:
            faults.append(Fault(number, f"the answer of {writer.name} {reason}: {text[:80]!r}"))
        else:
            answered.append({**row, "target": text})
    return answered


def caption_rows(
    rows: Sequence[ManifestRow], writer: Writer, questions: Sequence[str], faults: list[Fault]
) -> list[ManifestRow]:
    """Let a writer answer every question about every row's recording (DIFFA's stage 2).

    Rows are numbered in ``faults`` as they would be written: row by row, question by question.
    """
    entries = [{**row, "input": question} for row in rows for question in questions]
    if len(questions) > 1:
        for index, row in enumerate(entries):
            if row.get("audio_id") is not None:  # which no two rows may share
                row["audio_id"] = f"{row['audio_id']}-{index % len(questions)}"
    needs = ("seed_transcript", "input")
    return answer_rows(entries, writer, lambda row: caption_turns(row, row["input"]), faults, needs)


def rewrite_rows(
    rows: Sequence[ManifestRow], writer: Writer, faults: list[Fault]
) -> list[ManifestRow]:
    """Let a writer put every answer in its own words (self-distillation by the backbone)."""
    return answer_rows(rows, writer, rewrite_turns, faults, ("input", "target"))
