"""MMSU: 5,000 multiple-choice questions about speech, 47 tasks (dingdongwang/MMSU)."""

from __future__ import annotations

import random
from typing import Any

from diffa.evaluation.choice_parser import parse_choice
from diffa.evaluation.items import Fields, ItemScore, ItemScores, Question, Suite, as_text
from diffa.evaluation.prompts import mmsu_prompt

_OFFICIAL = ("mmsu@2026-02", "mmsu@2025-06")
_RELETTERED = {"mmsu@diffa": 4, "mmsu@diffa-2": 16}  # DIFFA's prompts and answer lengths
_SLOTS = {letter: f"choice_{letter.lower()}" for letter in "ABCD"}


class MMSU(Suite):
    """MMSU with its official letter rule and the fixed parser.

    453 of its 5,000 rows have two options, padded with null in any slot. The official prompts list
    null as ``None``, and every option has the letter of its slot. DIFFA's script drops null and
    letters the others anew (``mmsu@diffa``, ``mmsu@diffa-2``). Its evaluator still goes by slot,
    as the official parser does here; the fixed parser goes by the letters of the prompt.
    """

    name = "mmsu"
    response_column = "response"
    prompts: tuple[str, ...] = (*_OFFICIAL, *_RELETTERED)
    parsers = {"official": "mmsu@2026-02/official", "fixed": "mmsu/fixed"}  # noqa: RUF012
    groups = (("category",), ("category", "sub-category"), ("task_name",))

    def find_fault(self, fields: Fields) -> str:
        """Return what an item lacks to be asked or scored."""
        lacks = [name for name in ("question", "answer_gt") if not _is_present(fields.get(name))]
        if not lacks and not self.options(fields):
            lacks = ["choice_a to choice_d"]
        return f"has no {', '.join(lacks)}" if lacks else ""

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return the question in one block: 4 tokens as in DIFFA's paper, DIFFA-2's script 16."""
        length = _RELETTERED.get(prompt, 4)
        options = self.options(fields, prompt)
        texts: list[str | None] = [fields.get(slot) for slot in _SLOTS.values()]
        text = mmsu_prompt(
            "mmsu@2025-06" if prompt in _RELETTERED else prompt,
            str(fields["question"]),
            list(options.values()) if prompt in _RELETTERED else texts,
        )
        return Question(text, tuple(options), length, length)

    def options(self, fields: Fields, prompt: str = "") -> dict[str, str]:
        """Return letters and texts of the options ("None" can be one, null cannot)."""
        present = {
            letter: str(fields[slot])
            for letter, slot in _SLOTS.items()
            if _is_present(fields.get(slot))
        }
        if prompt in _RELETTERED:
            return dict(zip(_SLOTS, present.values(), strict=False))
        return present

    def answered_fields(self, fields: Fields, response: str, prompt: str) -> dict[str, Any]:
        """Return the columns with the response; the fixed parser needs DIFFA's prompt id."""
        note = {"prompt_id": prompt} if prompt in _RELETTERED else {}
        return {**super().answered_fields(fields, response, prompt), **note}

    def score(self, fields: Fields, rng: random.Random) -> ItemScores:
        """Score a response; the official parser excludes what it cannot read."""
        response, truth = as_text(fields.get(self.response_column)), fields["answer_gt"]
        letter = parse_official_letter(response)
        right = letter in _SLOTS and fields.get(_SLOTS[str(letter)]) == truth
        excluded = letter is None and bool(response.strip()) and response.strip() != "None"
        options = self.options(fields, as_text(fields.get("prompt_id")))
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
