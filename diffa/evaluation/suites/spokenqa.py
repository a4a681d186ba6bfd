"""Spoken question answering: LlamaQuestions, TriviaQA, WebQuestions, by their aliases."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from diffa.evaluation import word_errors as words
from diffa.evaluation.files import as_jsonl
from diffa.evaluation.items import Fields, Question, Reading, Readings, Row, text_of
from diffa.evaluation.prompts import VOICEBENCH_DIFFA

ANSWERS = ("aliases", "answers", "Answer", "answer", "reference")


class SpokenQA:
    """Right if an alias occurs in the answer: UltraEval-Audio's exist-match.

    The fixed parser also overlooks diacritics, punctuation and articles: ``The Beatles.`` is
    found in ``it was beatles``, and ``U.S.`` in ``the US``.
    """

    name = "spokenqa"
    key = "response"
    prompts: tuple[str, ...] = ("spokenqa@audio", "spokenqa@diffa")
    parsers = {"official": "qa_exist@ultraeval", "fixed": "spokenqa/fixed"}  # noqa: RUF012
    groups = (("subset",),)
    metric = "accuracy"
    lower = False

    def check(self, fields: Fields) -> str:
        """Return what a row lacks to be scored."""
        return "" if aliases(fields) else f"has no answer: none of the columns {', '.join(ANSWERS)}"

    def ask(self, fields: Fields, prompt: str) -> Question:
        """The audio says the question; DIFFA adds its instruction. 128 tokens in blocks of 32."""
        return Question(VOICEBENCH_DIFFA if prompt == "spokenqa@diffa" else "", (), 128, 32)

    def read(self, fields: Fields, draw: random.Random) -> Readings:
        """Whether an alias is a run of the answer's tokens."""
        said, known = text_of(fields.get(self.key)), aliases(fields)
        exact = [alias for alias in known if _within(words.tokens(alias), words.tokens(said))]
        loose = [alias for alias in known if _within(plain(alias), plain(said))]
        return {
            "official": Reading(exact[0] if exact else None, float(bool(exact))),
            "fixed": Reading(loose[0] if loose else None, float(bool(loose))),
        }

    def missed(self, fields: Fields) -> Readings:
        """Wrong for both parsers."""
        return {name: Reading(None, 0.0) for name in self.parsers}

    def summary(self, parser: str, readings: Sequence[Reading]) -> dict[str, Any]:
        """Nothing besides accuracy."""
        return {}

    def export(self, rows: Sequence[Row], stem: str) -> dict[str, str]:
        """JSONL with every input column and ``response``."""
        return {f"{stem}.jsonl": as_jsonl([dict(row.fields) for row in rows])}


def aliases(fields: Fields) -> list[str]:
    """The answers that count, from the first column that holds any."""
    for name in ANSWERS:
        found = fields.get(name)
        if found not in (None, "", []):
            values = found if isinstance(found, list) else [found]
            return [str(value) for value in values if str(value).strip()]
    return []


def plain(text: str) -> list[str]:
    """Words without diacritics, punctuation, articles and case; ``U.S.`` is ``us``."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(char for char in text if not unicodedata.combining(char)).casefold()
    text = re.sub(r"(?<=\w)[.'’](?=\w|$|\s)", "", text)  # noqa: RUF001
    return [word for word in re.findall(r"\w+", text) if word not in ("a", "an", "the")]


def _within(run: Sequence[str], whole: Sequence[str]) -> bool:
    size = len(run)
    return bool(size) and any(
        list(whole[at : at + size]) == list(run) for at in range(len(whole) - size + 1)
    )
