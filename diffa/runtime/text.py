"""Texts from outside (JSON of any shape, text that is no Unicode) and numbers in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(text: str | bytes, *, pairs: Callable[..., Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        text: A byte-order mark in front of it is left out.
        pairs: Builds an object from its pairs (``object_pairs_hook`` of ``json.loads``).

    Raises:
        ValueError: The text is no JSON, is nested too deeply, or holds a number that is too long.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_unicode(text: str) -> str:
    """Replace lone surrogates, which no file and no tokenizer takes, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: lone surrogates cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def count_passes(count: int) -> str:
    """Return a number of forward passes in words."""
    return f"{count} forward pass" + ("" if count == 1 else "es")
