"""Words of transcripts: three ways of normalising and cutting, and edits between two of them."""

from __future__ import annotations

import importlib.util
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

_SPACES = " \t\r\n"
_DROPPED = "!,?、。！，；？：「」︰『』《》"  # noqa: RUF001


class Edits(NamedTuple):
    """Cheapest edits from a reference to a hypothesis, all of cost 1."""

    substituted: int
    deleted: int
    inserted: int

    @property
    def errors(self) -> int:
        """All of them."""
        return sum(self)


def edits(reference: Sequence[str], said: Sequence[str]) -> Edits:
    """Count edits; of equally cheap ways the one with most substitutions."""
    row = [Edits(0, 0, n) for n in range(len(said) + 1)]
    for wanted in reference:
        above, row = row, [row[0]._replace(deleted=row[0].deleted + 1)]
        for place, word in enumerate(said):
            if word == wanted:
                row.append(above[place])
                continue
            changed, gone, more = above[place], above[place + 1], row[place]
            least = min(changed.errors, gone.errors, more.errors)
            if changed.errors == least:
                row.append(changed._replace(substituted=changed.substituted + 1))
            elif gone.errors == least:
                row.append(gone._replace(deleted=gone.deleted + 1))
            else:
                row.append(more._replace(inserted=more.inserted + 1))
    return row[-1]


def wenet(text: str) -> list[str]:
    """Tokens of WeNet's ``compute-wer.py --char=1``, upper-cased, ``<tags>`` removed.

    A letter without case (Chinese, kana) is a token; other text runs to a space, a character
    beyond ASCII, or the end of its tag. Punctuation is dropped only where it begins a token:
    ``hello,`` is not ``hello``, and full stops stay.
    """
    tokens, at = [], 0
    while at < len(text):
        here = text[at]
        kind = unicodedata.category(here)
        if here in _DROPPED or here in _SPACES or kind in ("Zs", "Cn"):
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


def whisper(text: str) -> list[str]:
    """Words after Whisper's English normaliser (that of transformers)."""
    return str(normaliser()(text)).split()


def characters(text: str) -> list[str]:
    """Characters after Whisper's basic normaliser, spaces left out: for Chinese-like text."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return [c for c in str(BasicTextNormalizer()(text)) if not c.isspace()]


@lru_cache
def normaliser() -> Any:
    """Whisper's English normaliser, with British spellings where their list is at hand."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(spellings())


@lru_cache
def spellings() -> dict[str, str]:
    """British to American spellings of openai-whisper, where it is installed; else none.

    transformers keeps them in each checkpoint (``normalizer.json``), not in its code. Reports
    say whether they were there.
    """
    found = importlib.util.find_spec("whisper")
    if found is None or not found.submodule_search_locations:
        return {}
    file = Path(next(iter(found.submodule_search_locations))) / "normalizers" / "english.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def tokens(text: str) -> list[str]:
    """Runs of letters, digits and marks, and every other visible character, in lower case (NFD)."""
    found: list[str] = []
    joined = False
    for char in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(char)[0]
        if kind in "LNM":
            if joined:
                found[-1] += char
            else:
                found.append(char)
        elif kind not in "ZC":
            found.append(char)
        joined = kind in "LNM"
    return [token.lower() for token in found]
