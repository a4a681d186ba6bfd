"""MMAU v05.15.25 (Sakshi113/MMAU) and MMAR (ddlBoJack/MMAR): scored by matching words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

from diffa.evaluation.choice_parser import parse_choice
from diffa.evaluation.items import (
    Fields,
    Item,
    ItemScore,
    ItemScores,
    Question,
    Suite,
    as_text,
    to_jsonl,
)
from diffa.evaluation.prompts import LETTERS, mmau_prompt


class MMAU(Suite):
    """MMAU with its official word sets; the fixed parser maps an answer to an option's text."""

    name = "mmau"
    response_column = "model_output"
    prompts: tuple[str, ...] = ("mmau@diffa", "mmau@authors")
    parsers = {"official": "mmau@05.15.25/non-parsed", "fixed": "mmau/fixed"}  # noqa: RUF012
    groups: tuple[tuple[str, ...], ...] = (("task",), ("difficulty",), ("sub-category",))

    def find_fault(self, fields: Fields) -> str:
        """Return what an item lacks to be asked or scored."""
        lacks = [name for name in ("question", "answer") if not fields.get(name)]
        if not isinstance(fields.get("choices"), list) or not fields["choices"]:
            lacks.append("list of choices")
        return f"has no {', '.join(lacks)}" if lacks else ""

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return the question with 16 tokens in one block, as in DIFFA's paper."""
        choices = [str(choice) for choice in fields["choices"]]
        text = mmau_prompt(prompt, str(fields["question"]), choices)
        return Question(text, tuple(choices), 16, 16)

    def score(self, fields: Fields, rng: random.Random) -> ItemScores:
        """Score a response; without one, the official script excludes the item."""
        excluded = self.name == "mmau" and self.response_column not in fields
        response = as_text(fields.get("model_prediction" if excluded else self.response_column))
        answer = str(fields["answer"])
        choices = [str(choice) for choice in fields["choices"]]
        options = dict(zip(LETTERS, choices, strict=False))
        letter = parse_choice(response, options, letters=False)
        right = match_words(answer, response, choices)
        fixed = options[letter] == answer if letter else right
        return {
            "official": ItemScore(response or None, float(right), 0.0 if excluded else 1.0),
            "fixed": ItemScore(options[letter] if letter else None, float(fixed)),
        }

    def export(self, items: Sequence[Item], stem: str) -> dict[str, str]:
        """Return a JSON list; the README names one response column, the script reads another."""
        rows = []
        for item in items:
            response = as_text(item.fields.get(self.response_column))
            both = {"model_output": response, "model_prediction": response}
            rows.append({**item.fields, **both})
        return {f"{stem}.json": json.dumps(rows, indent=1, ensure_ascii=False) + "\n"}


class MMAR(MMAU):
    """MMAR: MMAU's rule on another column."""

    name = "mmar"
    response_column = "answer_prediction"
    prompts = ("mmau@diffa", "mmar@authors")
    parsers = {"official": "mmar@2025/official", "fixed": "mmar/fixed"}  # noqa: RUF012
    groups = (("modality",), ("category",), ("sub-category",))

    def export(self, items: Sequence[Item], stem: str) -> dict[str, str]:
        """Return JSONL with every input column and ``answer_prediction``."""
        return {f"{stem}.jsonl": to_jsonl([item.fields for item in items])}


def match_words(answer: str, response: str, choices: Sequence[str]) -> bool:
    """Return whether a response has all words of the answer and none of wrong choices alone.

    A bare letter fails, and so does ``B. a dog`` if another choice has the word "b" or "a".
    """
    words, answer_words = _words(response), _words(answer)
    if not words:
        return False
    others = [_words(choice) for choice in choices]
    wrong = set().union(*(other - answer_words for other in others if other != answer_words))
    return answer_words <= words and not words & wrong


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))
