"""The fixed parser of multiple choice: which option does a free answer name?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

_CUES = re.compile(
    r"(?:answer|option|choice|choose|select|pick|is|be)\s*(?:is|:|=|-)?\s*(?:option|choice)?\s*"
    r"(?P<open>[\[({\"']*)(?P<letter>[a-z])(?P<close>[\])}.:,;\"']*)(?=\s|$)",
    re.IGNORECASE,
)
_SHORT = re.compile(r"[\[({\"']*([A-Za-z])[\])}.:,;\"']*$")
_LED = re.compile(r"[\[({\"']*([A-Z])[\])}.:;\"']+(?=\s|$)")


def chosen(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that an answer names, or None where it names none or two.

    In order: the answer is a letter alone; it begins with one (``B. seven``, ``(B)``); it is an
    option's text; a letter follows "answer", "option" and their like; one option's text alone
    occurs in it; one capital letter alone stands in it. An article ("a good thing") is no letter.

    Args:
        text: the model's answer.
        options: letters (A, B, ...) to the texts of the options.
    """
    words = plain(text)
    if not words:
        return None
    for pattern in (_SHORT, _LED):
        match = pattern.match(words)
        if match and match[1].upper() in options:
            return match[1].upper()
    keys = {letter: folded(option) for letter, option in options.items()}
    exact = [letter for letter, option in keys.items() if option and option == folded(words)]
    if len(exact) == 1:
        return exact[0]
    return _cued(words, options) or _mentioned(words, keys) or _standing(words, options)


def plain(text: str) -> str:
    """An answer without markup, invisible characters and full-width forms."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = re.sub(r"\\(?:boxed|text|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(re.sub(r"[*_`$#]+", "", text).split())


def folded(text: str) -> str:
    """Words in lower case without punctuation, for comparing texts."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _cued(words: str, options: Mapping[str, str]) -> str | None:
    """The letter behind the last cue, if all cues agree."""
    found = []
    for match in _CUES.finditer(words):
        letter = match["letter"]
        marked = match["open"] or match["close"] or match.end() == len(words)
        if letter.upper() in options and (letter.isupper() or marked):
            # "is a dog": a lower-case letter counts only where something marks it
            found.append(letter.upper())
    return found[-1] if found and len(set(found)) == 1 else None


def _mentioned(words: str, keys: Mapping[str, str]) -> str | None:
    """The only option whose text occurs, the longest where one contains another."""
    said = f" {folded(words)} "
    found = [letter for letter, option in keys.items() if option and f" {option} " in said]
    kept = [a for a in found if not any(a != b and f" {keys[a]} " in f" {keys[b]} " for b in found)]
    return kept[0] if len(kept) == 1 else None


def _standing(words: str, options: Mapping[str, str]) -> str | None:
    """The only capital letter that stands by itself; "A" and "I" are words where more follows."""
    found = set()
    for match in re.finditer(r"(?<![\w'])([A-Z])(?![\w'])", words):
        article = match[1] in "AI" and re.match(r"\s+(?!or\b|and\b)\w", words[match.end() :])
        if match[1] in options and not article:
            found.add(match[1])
    return found.pop() if len(found) == 1 else None
