"""MMSU: 5,000 multiple-choice questions about speech, 47 tasks (dingdongwang/MMSU)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from diffa.evaluation import prompts
from diffa.evaluation.choice_parser import chosen
from diffa.evaluation.files import as_jsonl
from diffa.evaluation.items import Fields, Question, Reading, Readings, Row, text_of

_SLOTS = {letter: f"choice_{letter.lower()}" for letter in "ABCD"}


class MMSU:
    """MMSU by its official letter rule, with the fixed parser beside it.

    Options keep the letters of their slots: some rows have two, padded with null in any slot.
    DIFFA's own script drops the padding and letters what is left anew, while the evaluator goes
    by slot, so that such rows count as wrong there.
    """

    name = "mmsu"
    key = "response"
    prompts: tuple[str, ...] = ("mmsu@2026-02", "mmsu@2025-06")
    parsers = {"official": "mmsu@2026-02/official", "fixed": "mmsu/fixed"}  # noqa: RUF012
    groups = (("category",), ("category", "sub-category"), ("task_name",))
    metric = "accuracy"
    lower = False
    max_tokens = 4

    def check(self, fields: Fields) -> str:
        """Return what a row lacks to be asked or scored."""
        lacks = [name for name in ("question", "answer_gt") if not _present(fields.get(name))]
        if not lacks and not any(_present(fields.get(slot)) for slot in _SLOTS.values()):
            lacks = ["choice_a to choice_d"]
        return f"has no {', '.join(lacks)}" if lacks else ""

    def ask(self, fields: Fields, prompt: str) -> Question:
        """The official prompt; the papers' answers are four tokens long."""
        texts = [fields.get(slot) for slot in _SLOTS.values()]
        text = prompts.mmsu(prompt, str(fields["question"]), texts)
        return Question(text, tuple(self.options(fields)), self.max_tokens, 4)

    def options(self, fields: Fields) -> dict[str, str]:
        """Letters to texts of the slots that hold an option ("None" can be one, null cannot)."""
        return {
            letter: str(fields[slot])
            for letter, slot in _SLOTS.items()
            if _present(fields.get(slot))
        }

    def read(self, fields: Fields, draw: random.Random) -> Readings:
        """Both parsers' readings; the official one leaves out what it cannot parse."""
        response, truth = text_of(fields.get(self.key)), fields["answer_gt"]
        letter = official_letter(response)
        right = letter in _SLOTS and fields.get(_SLOTS[str(letter)]) == truth
        excluded = letter is None and bool(response.strip()) and response.strip() != "None"
        options = self.options(fields)
        best = chosen(response, options)
        return {
            "official": Reading(letter, float(right), 0.0 if excluded else 1.0),
            "fixed": Reading(best, float(best is not None and options[best] == str(truth))),
        }

    def missed(self, fields: Fields) -> Readings:
        """Wrong for both parsers."""
        return {name: Reading(None, 0.0) for name in self.parsers}

    def summary(self, parser: str, readings: Sequence[Reading]) -> dict[str, Any]:
        """Nothing besides accuracy."""
        return {}

    def export(self, rows: Sequence[Row], stem: str) -> dict[str, str]:
        """JSONL with every input column and ``response``, as the official script reads it."""
        return {f"{stem}.jsonl": as_jsonl([dict(row.fields) for row in rows])}


def official_letter(response: str) -> str | None:
    """The official rule: the first character if it is A to D, else the last but one.

    ``Answer: B`` is an A, and ``**B**`` is nothing at all: such rows leave the denominator.
    """
    text = response.strip().replace("\n", "")
    if not text or text == "None":
        return None
    if text[0] in "ABCD":
        return text[0]
    return text[-2] if len(text) > 1 and text[-2] in "ABCD" else None


def _present(value: Any) -> bool:
    return value is not None and str(value) != ""
