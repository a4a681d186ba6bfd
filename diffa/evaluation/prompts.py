"""The official prompts, by version; every string is exact."""

from __future__ import annotations

from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_MMSU_2026 = (
    "Choose the most suitable answer from options A, B, C, and D. "
    "You must respond with only A, B, C, or D."
)
_MMSU_2025 = (
    "Choose the most suitable answer from options A, B, C, and D to respond the question in next "
    "line, **you should only choose A or B or C or D.** Do not provide any additional "
    "explanations or content."
)
_DIFFA_CHOICE = (
    "You are given the audio and a multiple-choice question. Choose the best answer based only on "
    "the speech content and style."
)
VOICEBENCH_DIFFA = (
    "\n### Instruction:\n"
    "Now, strictly follow my instructions: \n"
    "1. Do not repeat what you hear. \n"
    "2. Write an answer to response the question in the audio.\n"
    "\n### Response:\n"
)
"""DIFFA's addition to VoiceBench's audio; results are not comparable with the leaderboard."""


def list_choices(choices: Sequence[str | None], separator: str = "\n") -> str:
    """Return choices with letters: ``A. first``, ``B. second``; a missing one reads None."""
    pairs = zip(LETTERS, choices, strict=False)
    return separator.join(f"{letter}. {text}" for letter, text in pairs)


def mmsu_prompt(version: str, question: str, choices: Sequence[str | None]) -> str:
    """Return MMSU's prompt; the official script prints a missing choice as None."""
    lead = _MMSU_2026 if version == "mmsu@2026-02" else _MMSU_2025
    return f"{lead}\n\nQuestion: {question}\n\n{list_choices(choices)}"


def mmau_prompt(version: str, question: str, choices: Sequence[str]) -> str:
    """Return a prompt for MMAU or MMAR, neither of which prescribes one.

    ``mmau@authors`` and ``mmar@authors`` are what the authors report to work best; ``mmau@diffa``
    is DIFFA's for both.
    """
    if version == "mmau@authors":
        return f"{question}  Select one option from the provided choices.\n{list(choices)}."
    if version == "mmar@authors":
        listed = "\n".join(choices)
        return f"{question}\nSelect one option from the provided choices:\n{listed}"
    return f"{_DIFFA_CHOICE}\n\nQuestion: {question}\n\nChoices:\n{list_choices(choices)}\nAnswer:"
