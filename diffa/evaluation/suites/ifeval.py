"""IFEval: verifiable instructions (arXiv 2311.07911), summed as in VoiceBench."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from diffa.evaluation.items import Fields, ItemScore, ItemScores

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool | None]


def find_ifeval_fault(fields: Fields) -> str:
    """Return what keeps an item from being checked; ``""`` if nothing."""
    names, options = fields.get("instruction_id_list"), fields.get("kwargs")
    if not isinstance(names, list) or not isinstance(options, list) or len(names) != len(options):
        return "has no instruction_id_list with as many kwargs"
    unknown = [name for name in names if name not in CHECKS]
    return f"asks for unknown instructions: {', '.join(map(str, unknown))}" if unknown else ""


def score_ifeval(fields: Fields, response: str) -> ItemScores:
    """Score a response strictly and loosely.

    ``counts`` hold whether the prompt is followed strictly and loosely, how many instructions are,
    and how many there are. The official parser excludes an item whose language cannot be detected.
    """
    if response[:3] in ("<1>", "<2>", "<3>"):
        response = response[3:].strip()
    instructions = list(zip(fields["instruction_id_list"], fields["kwargs"], strict=True))
    strict = [follows_instruction(response, name, kw or {}) for name, kw in instructions]
    loose = [
        result is not None
        and any(follows_instruction(text, name, kw or {}) for text in loose_variants(response))
        for result, (name, kw) in zip(strict, instructions, strict=True)
    ]
    undetected, followed = None in strict, [result is True for result in strict]
    counts = tuple(
        float(count)
        for count in (all(followed), all(loose), sum(followed), sum(loose), len(instructions))
    )
    mean = (counts[0] + counts[1] + (counts[2] + counts[3]) / counts[4]) / 4
    names = ", ".join(
        name for (name, _), result in zip(instructions, followed, strict=True) if result
    )
    official = ItemScore(names or None, mean, counts=counts)
    if undetected:
        official = ItemScore(names or None, 0.0, 0.0)
    return {"official": official, "fixed": ItemScore(names or None, counts[0])}


def ifeval_metrics(scores: Sequence[ItemScore]) -> dict[str, Any]:
    """Return VoiceBench's mean of strict and loose, prompts and instructions, and its parts."""
    metrics: dict[str, Any] = {"sentences": "nltk" if _nltk() else "own splitter"}
    if _langdetect() is None:
        metrics["language"] = "not checked: pip install langdetect"
    counted = [score.counts for score in scores if score.denominator and score.counts]
    if not counted:
        return metrics
    sums = [sum(column) for column in zip(*counted, strict=True)]
    prompts, instructions = len(counted), sums[4]
    shares = (sums[0] / prompts, sums[1] / prompts, sums[2] / instructions, sums[3] / instructions)
    names = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    metrics |= {name: round(share, 6) for name, share in zip(names, shares, strict=True)}
    return {"accuracy": round(sum(shares) / 4, 6), **metrics}


def loose_variants(response: str) -> list[str]:
    """Return the response without its first line, its last, both; each also without asterisks."""
    lines = response.split("\n")
    parts = (lines[1:], lines[:-1], lines[1:-1])
    texts = [response, *("\n".join(part).strip() for part in parts)]
    return [*texts, *(text.replace("*", "") for text in texts)]


def follows_instruction(response: str, name: str, kwargs: Arguments) -> bool | None:
    """Return whether a response follows an instruction; None if its language is undetectable."""
    return CHECKS[name](response, kwargs) if response.strip() else False


def _compare(count: int, kwargs: Arguments, number: str, relation: str = "relation") -> bool:
    limit = int(kwargs[number])
    return count < limit if kwargs.get(relation) == "less than" else count >= limit


def _keywords(text: str, kwargs: Arguments) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in kwargs["keywords"])


def _keyword_frequency(text: str, kwargs: Arguments) -> bool:
    matches = re.findall(kwargs["keyword"].strip(), text, re.IGNORECASE)
    return _compare(len(matches), kwargs, "frequency")


def _forbidden(text: str, kwargs: Arguments) -> bool:
    words = kwargs["forbidden_words"]
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in words)


def _letters(text: str, kwargs: Arguments) -> bool:
    count = Counter(text.lower())[str(kwargs["letter"]).lower()]
    return _compare(count, kwargs, "let_frequency", "let_relation")


def _language(text: str, kwargs: Arguments) -> bool | None:
    return _speaks(text, str(kwargs["language"]))


def _sentences(text: str, kwargs: Arguments) -> bool:
    nltk = _nltk()
    ends = r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])"
    matches = nltk.sent_tokenize(text) if nltk else re.split(ends, text.strip())
    return _compare(len(matches), kwargs, "num_sentences")


def _paragraphs(text: str, kwargs: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return len([part for part in parts if part.strip()]) == int(kwargs["num_paragraphs"])


def _words(text: str, kwargs: Arguments) -> bool:
    return _compare(len(re.findall(r"\w+", text)), kwargs, "num_words")


def _nth_paragraph(text: str, kwargs: Arguments) -> bool:
    parts, nth = text.split("\n\n"), int(kwargs["nth_paragraph"])
    count = sum(bool(part.strip()) for part in parts)
    if nth > count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split(r"[.,?!'\"]", word)[0].lower()
    return count == int(kwargs["num_paragraphs"]) and first == str(kwargs["first_word"]).lower()


def _placeholders(text: str, kwargs: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= int(kwargs["num_placeholders"])


def _postscript(text: str, kwargs: Arguments) -> bool:
    marker = str(kwargs["postscript_marker"]).strip()
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(marker, r"\s*" + marker.lower() + r".*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def _bullets(text: str, kwargs: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == int(kwargs["num_bullets"])


def _constrained(text: str, kwargs: Arguments) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, kwargs: Arguments) -> bool:
    single = [match.strip("*") for match in re.findall(r"\*[^\n\*]*\*", text)]
    double = [match[2:-2] for match in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(t.strip()) for t in single + double) >= int(kwargs["num_highlights"])


def _sections(text: str, kwargs: Arguments) -> bool:
    mark = str(kwargs["section_spliter"]).strip()
    return len(re.split(rf"\s?{mark}\s?\d+\s?", text)) - 1 >= int(kwargs["num_sections"])


def _json(text: str, kwargs: Arguments) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, kwargs: Arguments) -> bool:
    titles = re.findall(r"<<[^\n]+>>", text)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def _two_responses(text: str, kwargs: Arguments) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def _repeats(text: str, kwargs: Arguments) -> bool:
    return text.strip().lower().startswith(str(kwargs["prompt_to_repeat"]).strip().lower())


def _ends(text: str, kwargs: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(str(kwargs["end_phrase"]).strip().lower())


def _capital_words(text: str, kwargs: Arguments) -> bool:
    nltk = _nltk()
    words = nltk.word_tokenize(text) if nltk else re.findall(r"\w+(?:[-.]\w+)*", text)
    count = sum(word.isupper() for word in words)
    return _compare(count, kwargs, "capital_frequency", "capital_relation")


def _capitals(text: str, kwargs: Arguments) -> bool | None:
    return _speaks(text, "en") if text.isupper() else False


def _lower(text: str, kwargs: Arguments) -> bool | None:
    return _speaks(text, "en") if text.islower() else False


def _quoted(text: str, kwargs: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capitals,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": lambda text, kwargs: "," not in text,
}


def _speaks(text: str, language: str) -> bool | None:
    """Return whether a text is in a language; undecidable texts pass, as officially."""
    detector = _langdetect()
    if detector is None:
        return None
    try:
        return bool(detector.detect(text) == language)
    except detector.LangDetectException:
        return True


def _langdetect() -> Any:
    try:
        return import_module("langdetect")
    except ImportError:
        return None


def _nltk() -> Any:
    """Return nltk with its sentence model; None if either is missing."""
    try:
        nltk = import_module("nltk")
        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        return None
    return nltk
