"""Spoken question answering: LlamaQuestions, TriviaQA and WebQuestions, by their aliases."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence

from diffa.evaluation.items import Fields, ItemScore, ItemScores, Question, Suite, as_text
from diffa.evaluation.prompts import VOICEBENCH_DIFFA
from diffa.evaluation.word_errors import unicode_tokens

_ANSWERS = ("aliases", "answers", "Answer", "answer", "reference")


class SpokenQA(Suite):
    """Right if an alias occurs in the answer: UltraEval-Audio's exist-match.

    The fixed parser also ignores diacritics, punctuation and articles: ``The Beatles.`` matches
    ``it was beatles``, and ``U.S.`` matches ``the US``.
    """

    name = "spokenqa"
    response_column = "response"
    prompts = ("spokenqa@audio", "spokenqa@diffa")
    parsers = {"official": "qa_exist@ultraeval", "fixed": "spokenqa/fixed"}  # noqa: RUF012
    groups = (("subset",),)

    def find_fault(self, fields: Fields) -> str:
        """Return what an item lacks to be scored."""
        if _aliases(fields):
            return ""
        return f"has no answer: none of the columns {', '.join(_ANSWERS)}"

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return an empty text or DIFFA's instruction, with 128 tokens in blocks of 32."""
        if prompt == "spokenqa@diffa":
            return Question(VOICEBENCH_DIFFA, (), 128, 32, trim=False)
        return Question("", (), 128, 32)

    def score(self, fields: Fields, rng: random.Random) -> ItemScores:
        """Return whether the tokens of an alias occur in those of the response."""
        response = as_text(fields.get(self.response_column))
        scores = {}
        for name, tokenize in (("official", unicode_tokens), ("fixed", answer_words)):
            words = tokenize(response)
            alias = next((a for a in _aliases(fields) if _contains(words, tokenize(a))), None)
            scores[name] = ItemScore(alias, float(alias is not None))
        return scores


def answer_words(text: str) -> list[str]:
    """Return words without diacritics, punctuation, articles and case; ``U.S.`` is ``us``."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(char for char in text if not unicodedata.combining(char)).casefold()
    text = re.sub(r"(?<=\w)[.'’](?=\w|$|\s)", "", text)  # noqa: RUF001
    return [word for word in re.findall(r"\w+", text) if word not in ("a", "an", "the")]


def _aliases(fields: Fields) -> list[str]:
    """Return the accepted answers, from the first column that holds any."""
    for name in _ANSWERS:
        value = fields.get(name)
        if value not in (None, "", []):
            values = value if isinstance(value, list) else [value]
            return [str(value) for value in values if str(value).strip()]
    return []


def _contains(words: Sequence[str], run: Sequence[str]) -> bool:
    size = len(run)
    starts = range(len(words) - size + 1) if size else ()
    return any(list(words[start : start + size]) == list(run) for start in starts)
