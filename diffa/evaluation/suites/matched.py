"""MMAU v05.15.25 (Sakshi113/MMAU) and MMAR (ddlBoJack/MMAR): scored by matching words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

from diffa.evaluation import prompts
from diffa.evaluation.choice_parser import chosen
from diffa.evaluation.files import as_jsonl
from diffa.evaluation.items import Fields, Question, Reading, Readings, Row, text_of
from diffa.evaluation.prompts import LETTERS


class MMAU:
    """MMAU by its official word sets; the fixed parser maps an answer to an option's text first."""

    name = "mmau"
    key = "model_output"
    prompts: tuple[str, ...] = ("mmau@diffa", "mmau@authors")
    parsers = {"official": "mmau@05.15.25/non-parsed", "fixed": "mmau/fixed"}  # noqa: RUF012
    groups: tuple[tuple[str, ...], ...] = (("task",), ("difficulty",), ("sub-category",))
    metric = "accuracy"
    lower = False

    def check(self, fields: Fields) -> str:
        """Return what a row lacks to be asked or scored."""
        lacks = [name for name in ("question", "answer") if not fields.get(name)]
        if not isinstance(fields.get("choices"), list) or not fields["choices"]:
            lacks.append("list of choices")
        return f"has no {', '.join(lacks)}" if lacks else ""

    def ask(self, fields: Fields, prompt: str) -> Question:
        """A prompt by id; the papers' answers are 16 tokens in one block."""
        choices = [str(choice) for choice in fields["choices"]]
        text = prompts.choice(prompt, str(fields["question"]), choices)
        return Question(text, tuple(choices), 16, 16)

    def read(self, fields: Fields, draw: random.Random) -> Readings:
        """Both readings. A row without a prediction is left out officially, and wrong with us."""
        skipped = self.name == "mmau" and self.key not in fields
        output = text_of(fields.get("model_prediction" if skipped else self.key))
        answer = str(fields["answer"])
        choices = [str(choice) for choice in fields["choices"]]
        options = dict(zip(LETTERS, choices, strict=False))
        letter = chosen(output, options)
        text = options[letter] if letter else output
        right = official_match(answer, output, choices)
        fixed = options[letter] == answer if letter else official_match(answer, text, choices)
        return {
            "official": Reading(output or None, float(right), 0.0 if skipped else 1.0),
            "fixed": Reading(options[letter] if letter else None, float(fixed)),
        }

    def missed(self, fields: Fields) -> Readings:
        """Wrong for both parsers."""
        return {name: Reading(None, 0.0) for name in self.parsers}

    def summary(self, parser: str, readings: Sequence[Reading]) -> dict[str, Any]:
        """Nothing besides accuracy."""
        return {}

    def export(self, rows: Sequence[Row], stem: str) -> dict[str, str]:
        """A JSON list with both keys: the README names one and the script reads the other."""
        listed: list[dict[str, Any]] = [
            {
                **row.fields,
                "model_output": text_of(row.fields.get(self.key)),
                "model_prediction": text_of(row.fields.get(self.key)),
            }
            for row in rows
        ]
        return {f"{stem}.json": json.dumps(listed, indent=1, ensure_ascii=False) + "\n"}


class MMAR(MMAU):
    """MMAR: MMAU's rule on another column."""

    name = "mmar"
    key = "answer_prediction"
    prompts: tuple[str, ...] = ("mmau@diffa", "mmar@authors")
    parsers = {"official": "mmar@2025/official", "fixed": "mmar/fixed"}  # noqa: RUF012
    groups = (("modality",), ("category",), ("sub-category",))

    def export(self, rows: Sequence[Row], stem: str) -> dict[str, str]:
        """JSONL with every input column and ``answer_prediction``."""
        return {f"{stem}.jsonl": as_jsonl([dict(row.fields) for row in rows])}


def official_match(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """Whether all the answer's words are said, and none that only wrong choices have.

    A bare letter fails, and so does ``B. a dog`` where another choice has the word "b" or "a".
    """
    said, wanted = _words(prediction), _words(answer)
    if not said:
        return False
    others = [_words(choice) for choice in choices]
    wrong = set().union(*(words - wanted for words in others if words != wanted))
    return wanted <= said and not said & wrong


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))
