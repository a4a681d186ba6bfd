"""MMSU: 5,000 multiple-choice questions about speech, 47 tasks (dingdongwang/MMSU)."""

from __future__ import annotations

import random
from typing import Any

from diffa.evaluation.choice_parser import parse_choice
from diffa.evaluation.items import Fields, ItemScore, ItemScores, Question, Suite, as_text
from diffa.evaluation.prompts import mmsu_prompt

_SLOTS = {letter: f"choice_{letter.lower()}" for letter in "ABCD"}


class MMSU(Suite):
    """MMSU with its official letter rule and the fixed parser.

    Options keep the letters of their slots: some rows have two options, padded with null in any
    slot. DIFFA's script drops the padding and assigns new letters, while the evaluator goes by
    slot, so it counts such rows as wrong.
    """

    name = "mmsu"
    response_column = "response"
    prompts: tuple[str, ...] = ("mmsu@2026-02", "mmsu@2025-06")
    parsers = {"official": "mmsu@2026-02/official", "fixed": "mmsu/fixed"}  # noqa: RUF012
    groups = (("category",), ("category", "sub-category"), ("task_name",))

    def find_fault(self, fields: Fields) -> str:
        """Return what an item lacks to be asked or scored."""
        lacks = [name for name in ("question", "answer_gt") if not _is_present(fields.get(name))]
        if not lacks and not self.options(fields):
            lacks = ["choice_a to choice_d"]
        return f"has no {', '.join(lacks)}" if lacks else ""

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return the official prompt with 4 tokens in one block, as in DIFFA's paper."""
        texts = [fields.get(slot) for slot in _SLOTS.values()]
        text = mmsu_prompt(prompt, str(fields["question"]), texts)
        return Question(text, tuple(self.options(fields)), 4, 4)

    def options(self, fields: Fields) -> dict[str, str]:
        """Return letters and texts of the options ("None" can be one, null cannot)."""
        return {
            letter: str(fields[slot])
            for letter, slot in _SLOTS.items()
            if _is_present(fields.get(slot))
        }

    def score(self, fields: Fields, rng: random.Random) -> ItemScores:
        """Score a response; the official parser excludes what it cannot read."""
        response, truth = as_text(fields.get(self.response_column)), fields["answer_gt"]
        letter = parse_official_letter(response)
        right = letter in _SLOTS and fields.get(_SLOTS[str(letter)]) == truth
        excluded = letter is None and bool(response.strip()) and response.strip() != "None"
        options = self.options(fields)
        choice = parse_choice(response, options)
        fixed = choice is not None and options[choice] == str(truth)
        return {
            "official": ItemScore(letter, float(right), 0.0 if excluded else 1.0),
            "fixed": ItemScore(choice, float(fixed)),
        }


def parse_official_letter(response: str) -> str | None:
    """Return the first character if it is A to D, else the last but one if that is.

    By this official rule ``Answer: B`` is an A, and ``**B**`` is excluded.
    """
    text = response.strip().replace("\n", "")
    if not text or text == "None":
        return None
    if text[0] in "ABCD":
        return text[0]
    return text[-2] if len(text) > 1 and text[-2] in "ABCD" else None


def _is_present(value: Any) -> bool:
    return value is not None and str(value) != ""
