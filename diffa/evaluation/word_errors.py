"""Word errors: three ways to normalise and tokenise transcripts, and edits between two."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from diffa.runtime.text import parse_json

_SPACES = " \t\r\n"
_PUNCTUATION = "!,?、。！，；？：「」︰『』《》"  # noqa: RUF001


class EditCounts(NamedTuple):
    """The cheapest edits from a reference to a hypothesis, all of cost 1."""

    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """Number of all edits."""
        return sum(self)


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> EditCounts:
    """Count edits (Levenshtein); of equally cheap ways, the one with most substitutions."""
    # row[j]: edits from the reference so far to the first j words of the hypothesis
    row = [EditCounts(0, 0, n) for n in range(len(hypothesis) + 1)]
    for expected in reference:
        above, row = row, [row[0]._replace(deletions=row[0].deletions + 1)]
        for j, word in enumerate(hypothesis):
            if word == expected:
                row.append(above[j])
                continue
            substitute, delete, insert = above[j], above[j + 1], row[j]
            least = min(substitute.errors, delete.errors, insert.errors)
            if substitute.errors == least:
                row.append(substitute._replace(substitutions=substitute.substitutions + 1))
            elif delete.errors == least:
                row.append(delete._replace(deletions=delete.deletions + 1))
            else:
                row.append(insert._replace(insertions=insert.insertions + 1))
    return row[-1]


def wenet_tokens(text: str) -> list[str]:
    """Return the tokens of WeNet's ``compute-wer.py --char=1``, upper-cased, without ``<tags>``.

    A letter without case (Chinese, kana) is a token; other text runs to a space, a character
    beyond ASCII, or the end of its tag. Punctuation is dropped only at the start of a token:
    ``hello,`` is not ``hello``, and full stops stay.
    """
    tokens, at = [], 0
    while at < len(text):
        here = text[at]
        kind = unicodedata.category(here)
        if here in _PUNCTUATION or here in _SPACES or kind in ("Zs", "Cn"):
            at += 1
            continue
        end = at + 1
        if kind != "Lo":
            close = ">" if here == "<" else " "
            while end < len(text) and not (
                ord(text[end]) >= 128 or text[end] in _SPACES or text[end] == close
            ):
                end += 1
            end += end < len(text) and text[end] == ">"
        tokens.append(re.sub(r"<[^>]*>", "", text[at:end]).upper())
        at = end
    return [token for token in tokens if token]


def whisper_words(text: str) -> list[str]:
    """Return words after Whisper's English normaliser (from transformers)."""
    return str(_whisper_normalizer()(text)).split()


def whisper_characters(text: str) -> list[str]:
    """Return characters without spaces after Whisper's basic normaliser, for Chinese-like text."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return [c for c in str(BasicTextNormalizer()(text)) if not c.isspace()]


@lru_cache
def british_spellings() -> dict[str, str]:
    """Return British to American spellings of openai-whisper; empty if it is not installed.

    transformers keeps them in each checkpoint (``normalizer.json``), not in its code. Reports
    name a parser without them ``no-spellings``.
    """
    package = importlib.util.find_spec("whisper")
    if package is None or not package.submodule_search_locations:
        return {}
    file = Path(next(iter(package.submodule_search_locations))) / "normalizers" / "english.json"
    return dict(parse_json(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def unicode_tokens(text: str) -> list[str]:
    """Return runs of letters, digits and marks, and every other visible character, lower-cased."""
    tokens: list[str] = []
    in_word = False
    for char in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(char)[0]
        if kind in "LNM" and in_word:
            tokens[-1] += char
        elif kind not in "ZC":
            tokens.append(char)
        in_word = kind in "LNM"
    return [token.lower() for token in tokens]


@lru_cache
def _whisper_normalizer() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(british_spellings())
