"""The fixed parser of multiple choice: find the option that a free answer names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

_CUES = re.compile(
    r"(?:answer|option|choice|choose|select|pick|is|be)\s*(?:is|:|=|-)?\s*(?:option|choice)?\s*"
    r"(?P<open>[\[({\"']*)(?P<letter>[a-z])(?P<close>[\])}.:,;\"']*)(?=\s|$)",
    re.IGNORECASE,
)
_LETTER_ALONE = re.compile(r"[\[({\"']*([A-Za-z])[\])}.:,;\"']*$")
_LETTER_FIRST = re.compile(r"[\[({\"']*([A-Z])[\])}.:;\"']+(?=\s|$)")


def parse_choice(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that an answer names; None if it names none or several.

    Rules, in order: the answer is one letter; it begins with one (``B. seven``, ``(B)``); it is the
    text of one option; a letter follows "answer", "option" or similar; the text of one option
    alone occurs; one capital letter stands alone. An article ("a good thing") is not a letter.

    Args:
        text: A model's answer.
        options: Letters (A, B, ...) to the texts of the options.
    """
    words = strip_markup(text)
    if not words:
        return None
    for pattern in (_LETTER_ALONE, _LETTER_FIRST):
        match = pattern.match(words)
        if match and match[1].upper() in options:
            return match[1].upper()
    folded = {letter: fold_words(option) for letter, option in options.items()}
    exact = [letter for letter, option in folded.items() if option and option == fold_words(words)]
    if len(exact) == 1:
        return exact[0]
    return (
        _letter_after_cue(words, options)
        or _option_mentioned(words, folded)
        or _standalone_letter(words, options)
    )


def strip_markup(text: str) -> str:
    """Return an answer without Markdown, LaTeX boxes, invisible characters and full-width forms."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = re.sub(r"\\(?:boxed|text|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(re.sub(r"[*_`$#]+", "", text).split())


def fold_words(text: str) -> str:
    """Return the words in lower case without punctuation, for comparisons."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _letter_after_cue(words: str, options: Mapping[str, str]) -> str | None:
    """Return the letter after "answer", "option" or similar, if all of them agree."""
    letters = set()
    for match in _CUES.finditer(words):
        letter = match["letter"]
        marked = match["open"] or match["close"] or match.end() == len(words)
        # "is a dog": a lower-case letter counts only with a bracket, a mark or at the end.
        if letter.upper() in options and (letter.isupper() or marked):
            letters.add(letter.upper())
    return letters.pop() if len(letters) == 1 else None


def _option_mentioned(words: str, folded: Mapping[str, str]) -> str | None:
    """Return the only option whose text occurs; of nested options, the longest."""
    answer = f" {fold_words(words)} "
    mentioned = [letter for letter, option in folded.items() if option and f" {option} " in answer]
    outer = [
        a
        for a in mentioned
        if not any(a != b and f" {folded[a]} " in f" {folded[b]} " for b in mentioned)
    ]
    return outer[0] if len(outer) == 1 else None


def _standalone_letter(words: str, options: Mapping[str, str]) -> str | None:
    """Return the only capital letter that stands alone."""
    letters = set()
    for match in re.finditer(r"(?<![\w'])([A-Z])(?![\w'])", words):
        # "A" and "I" are English words if another word follows.
        article = match[1] in "AI" and re.match(r"\s+(?!or\b|and\b)\w", words[match.end() :])
        if match[1] in options and not article:
            letters.add(match[1])
    return letters.pop() if len(letters) == 1 else None
