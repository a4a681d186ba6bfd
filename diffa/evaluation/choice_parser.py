"""The fixed parser of multiple choice: find the option that a free answer names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

# A letter ends where no Latin letter, digit or apostrophe follows: "B입니다" and "选B。" hold one.
_END = r"(?![A-Za-z0-9'])"
_CUES = re.compile(
    r"(?:(?:answer|option|choice|choose|select|pick|is|be)(?![a-z])|答案|选|選|是|정답|답은?)"
    r"\s*(?:is|:|=|-|是|为|為|은|는)?\s*(?:option|choice)?\s*"
    rf"(?P<open>[\[({{\"']*)(?P<letter>[a-z]){_END}(?P<close>[\])}}.:,;\"']*)",
    re.IGNORECASE,
)
_ALONE = re.compile(r"[\[({\"']*([A-Za-z])[\])}.:,;\"']*")
# A leading letter: before a bracket, a mark, a dash, a line end, a word such as "because", or a
# character of another script.
_REASON = "because|since|as|for|is|was|seems|would"
_NEGATION = r"(?:not|wrong|incorrect|false|unlikely|impossible)\b"
_LEADING = re.compile(
    r"""[\[({"']*([A-Z])(?:[\])}"']+(?=\W|$)|[\])}"']*[.:;](?=\s|$)|,(?!\s*[A-Z]\b)|\s*[-\u2013\u2014]+(?=\s|$)|\n"""
    rf"""|\s+(?=(?:{_REASON})\b(?! {_NEGATION}))|\s+(?=\((?:not|instead))|(?=[^\W\d_a-zA-Z']))"""
    r"""|[\[({"']*([a-z])(?:[\])}.:](?=\s|$)|,?\s+(?=because\b|since\b)|\n)"""
)
_JSON_ANSWER = re.compile(
    r"""["']?(?:final_)?(?:answer|option|choice|letter)["']?\s*:\s*["']?([^"'},]+)["']?\s*[,}]""",
    re.IGNORECASE,
)


def parse_choice(text: str, options: Mapping[str, str], *, letters: bool = True) -> str | None:
    """Return the letter of the option that an answer names; None if it names none or several.

    Thoughts (``<think>``) are left out. Rules, in order: the answer is the text of one option, or
    one letter (the letter first if the prompt asks for one); it begins with a letter (``B. seven``,
    ``B, because ...``, ``B`` and a line break); a letter or an option's text follows "answer",
    "option" or similar; the text of one option alone occurs; one capital letter stands alone.
    An article ("a good thing") and the beginning of an option ("A minor") are no letters.

    Args:
        text: A model's answer.
        options: Letters (A, B, ...) to the texts of the options.
        letters: Whether the prompt asks for a letter, and not for an option's text.
    """
    lines = strip_markup(_without_thoughts(text), keep_lines=True)
    if match := _JSON_ANSWER.search(lines):
        lines = match[1].strip()
    words = " ".join(lines.split())
    if not words:
        return None
    alone = _ALONE.fullmatch(words)
    letter = alone[1].upper() if alone and alone[1].upper() in options else None
    exact = _exact_option(words, options)
    if letter or exact:
        bracketed = letter and words[0] in "([{"
        return (letter or exact) if letters or bracketed else (exact or letter)
    folded = {letter: fold_words(option) for letter, option in options.items()}
    # Options such as musical keys ("D") are letters themselves: there a letter is a text.
    texts_are_letters = not letters and any(text.upper() in options for text in folded.values())
    if not texts_are_letters:
        choice = _leading_letter(lines, options, folded) or _after_cue(words, options, folded)
        if choice:
            return choice
    mentioned = _option_mentioned(words, folded)
    return mentioned if mentioned or texts_are_letters else _standalone_letter(words, options)


def _without_thoughts(text: str) -> str:
    """Return an answer without its block of thoughts; one that never ends leaves nothing."""
    return re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.DOTALL | re.IGNORECASE)


def strip_markup(text: str, *, keep_lines: bool = False) -> str:
    """Return an answer without Markdown, LaTeX boxes, invisible characters and full-width forms.

    Args:
        text: An answer.
        keep_lines: Whether line breaks stay; otherwise they become spaces.
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = re.sub(r"\\(?:boxed|text|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    lines = [" ".join(line.split()) for line in re.sub(r"[*_`$#]+", "", text).splitlines()]
    return ("\n" if keep_lines else " ").join(line for line in lines if line)


def _exact_option(words: str, options: Mapping[str, str]) -> str | None:
    """Return the option that the answer equals: to the letter, or else in its words."""
    for fold in (lambda text: " ".join(text.casefold().split()), fold_words):
        target = fold(words)
        equal = [letter for letter, option in options.items() if target and fold(option) == target]
        if len(equal) == 1:
            return equal[0]
    return None


def _leading_letter(
    lines: str, options: Mapping[str, str], folded: Mapping[str, str]
) -> str | None:
    match = _LEADING.match(lines)
    letter = (match[1] or match[2]).upper() if match else None
    if letter is None or letter not in options or _begins_with_option(lines, letter, folded):
        return None
    return letter


def _begins_with_option(text: str, letter: str, folded: Mapping[str, str]) -> str | None:
    """Return the option whose text stands at the beginning, and begins with this letter."""
    start = f"{fold_words(text)} "
    matches = [
        key
        for key, option in folded.items()
        if option.startswith(f"{letter.lower()} ") and start.startswith(f"{option} ")
    ]
    return max(matches, key=lambda key: len(folded[key]), default=None)


def fold_words(text: str) -> str:
    """Return the words in lower case without punctuation, for comparisons."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _after_cue(words: str, options: Mapping[str, str], folded: Mapping[str, str]) -> str | None:
    """Return the option after "answer", "option" or similar, if all of them agree."""
    matches = set()
    for match in _CUES.finditer(words):
        letter = match["letter"]
        if option := _begins_with_option(words[match.start("letter") :], letter, folded):
            matches.add(option)
            continue
        last = match.end() == len(words)
        marked = match["open"] or match["close"] or last
        rest = words[match.end() :]
        article = letter == "A" and not marked and re.match(rf" (?!(?:{_REASON})\b)", rest)
        # "is a dog": a lower-case letter counts only with a bracket, a mark or at the end.
        if letter.upper() in options and (letter.isupper() or marked) and not article:
            matches.add(letter.upper())
    return matches.pop() if len(matches) == 1 else None


def _option_mentioned(words: str, folded: Mapping[str, str]) -> str | None:
    """Return the only option whose text occurs; of nested options, the longest."""
    answer = f" {fold_words(words)} "
    mentioned = [
        letter
        for letter, option in folded.items()
        if option and (option if _is_cjk(option) else f" {option} ") in answer
    ]
    outer = [
        a
        for a in mentioned
        if not any(a != b and f" {folded[a]} " in f" {folded[b]} " for b in mentioned)
    ]
    return outer[0] if len(outer) == 1 else None


def _is_cjk(text: str) -> bool:
    """Return whether a text is of a script that puts no spaces between words, or few."""
    return any(character >= "\u2e80" for character in text)


def _standalone_letter(words: str, options: Mapping[str, str]) -> str | None:
    """Return the only capital letter that stands alone."""
    letters = set()
    for match in re.finditer(r"(?<![A-Za-z0-9_'-])([A-Z])(?![A-Za-z0-9_'-])", words):
        # "A" and "I" are English words if another word follows.
        article = match[1] in "AI" and re.match(r"\s+(?!or\b|and\b)\w", words[match.end() :])
        if match[1] in options and not article:
            letters.add(match[1])
    return letters.pop() if len(letters) == 1 else None
