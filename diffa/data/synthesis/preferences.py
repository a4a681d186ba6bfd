"""Pairs of a right answer and one that gets a single audio attribute wrong (DIFFA-2, stage 4)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffa.data.samples import Fault, ManifestRow, derive_seed
from diffa.data.synthesis.captions import answer_fault, strip_thinking
from diffa.data.synthesis.writers import Conversation, Writer, conversation, write_all
from diffa.runtime.text import parse_json

Rng = np.random.Generator

GENDER_WORDS = {
    "male": "female",
    "man": "woman",
    "men": "women",
    "boy": "girl",
    "he": "she",
    "his": "her",
    "himself": "herself",
    "masculine": "feminine",
}
"""Words of the two genders; an answer must change all of them or it contradicts itself."""

COMMON_VALUES = {
    "pitch": ("low", "medium", "high"),
    "volume": ("quiet", "normal", "loud"),
    "speed": ("slow", "normal", "fast"),
    "gender": ("male", "female"),
}

CORRUPTION_PROMPT = (
    "You make training data for a system that listens to audio. You get notes on a recording, a "
    "question and a right answer. Write a wrong answer that is as fluent, as long and in the same "
    "style, but gets exactly one thing wrong: {attribute}. Everything else stays as it is. Reply "
    'with JSON alone: {{"rejected": "the wrong answer", "explanation": "what is wrong with it"}}'
)
JUDGE_PROMPT = (
    "You get notes on a recording, a question and two answers. Which of them agrees with the "
    "notes? Reply with one letter: A, B, or C for both or neither."
)


class Corruption(NamedTuple):
    """A wrong answer, the one attribute that it gets wrong, and how."""

    rejected: str
    attribute: str
    explanation: str


def preference_row(row: ManifestRow, corruption: Corruption, source: str) -> ManifestRow:
    """Add the published preference keys to a row; ``chosen`` is its ``target``."""
    return {
        **row,
        "chosen": row["target"],
        "rejected": corruption.rejected,
        "dpo_explanation": corruption.explanation,
        "dpo_source": source,
    }


class AttributeValues:
    """Every attribute's values in a corpus, from which wrong ones are drawn."""

    def __init__(self, rows: Sequence[ManifestRow]) -> None:
        counts: dict[str, Counter[str]] = {name: Counter(v) for name, v in COMMON_VALUES.items()}
        self.words: list[str] = []
        for row in rows:
            self.words += re.findall(r"[\w']+", str(row.get("transcription") or "").lower())
            for name, value in (row.get("attributes") or {}).items():
                if name not in ("text", "duration"):
                    counts.setdefault(name, Counter())[value] += 1
        self.values = {name: tuple(sorted(count)) for name, count in counts.items()}
        self.words = sorted(set(self.words))


def corrupt_row(row: ManifestRow, values: AttributeValues, seed: int = 0) -> Corruption | None:
    """Return a row's answer with one attribute wrong; None if the answer names none of them.

    Which attribute and which value follow from ``seed`` and the row's id alone.
    """
    rng = np.random.default_rng(
        (seed, derive_seed(str(row.get("audio_id")), row.get("input") or ""))
    )
    known: Mapping[str, str] = row.get("attributes") or {}
    corruptions = []
    for name, value in known.items():
        if name == "gender":
            corruption = _other_gender(row["target"])
        elif name == "text":
            corruption = _other_word(
                row["target"], str(row.get("transcription") or ""), values, rng
            )
        else:
            corruption = _other_value(row["target"], name, value, values, rng)
        if corruption:
            corruptions.append(corruption)
    return corruptions[int(rng.integers(len(corruptions)))] if corruptions else None


def _other_gender(text: str) -> Corruption | None:
    swap = GENDER_WORDS | {new: old for old, new in GENDER_WORDS.items()}
    pattern = re.compile(rf"\b({'|'.join(swap)})\b", re.IGNORECASE)
    if not (first := pattern.search(text)):
        return None
    changed = pattern.sub(lambda match: _cased(swap[match[0].lower()], match[0]), text)
    return Corruption(changed, "gender", f"gender: {swap[first[0].lower()]}, not {first[0]}")


def _other_value(
    text: str, name: str, value: str, values: AttributeValues, rng: Rng
) -> Corruption | None:
    pattern = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)", re.IGNORECASE)
    others = [other for other in values.values.get(name, ()) if other.lower() != value.lower()]
    if not others or len(pattern.findall(text)) != 1:  # twice: it may stand for something else
        return None
    other = others[int(rng.integers(len(others)))]
    changed = pattern.sub(lambda match: _cased(other, match[0]), text)
    return Corruption(changed, name, f"{name}: {other}, not {value}")


def _other_word(text: str, transcript: str, values: AttributeValues, rng: Rng) -> Corruption | None:
    """Change one word of the transcript where the answer repeats it whole."""
    at = text.lower().find(transcript.lower()) if transcript else -1
    words = list(re.finditer(r"[\w']+", transcript))
    others = [word for word in values.words if word not in transcript.lower().split()]
    if at < 0 or not words or not others:
        return None
    word = words[int(rng.integers(len(words)))]
    other = _cased(others[int(rng.integers(len(others)))], word[0])
    changed = text[: at + word.start()] + other + text[at + word.end() :]
    return Corruption(changed, "text", f"text: {other!r}, not {word[0]!r}")


def _cased(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def pairs_from_labels(
    rows: Sequence[ManifestRow], faults: list[Fault], seed: int = 0
) -> list[ManifestRow]:
    """Pair every row's answer with a corrupted one, by its attributes alone, without a model."""
    values, pairs = AttributeValues(rows), []
    for number, row in enumerate(rows, start=1):
        corruption = corrupt_row(row, values, seed)
        if corruption is None:
            faults.append(Fault(number, "has an answer that names none of its attributes"))
        else:
            pairs.append(preference_row(row, corruption, f"labels_{corruption.attribute}_v1"))
    return pairs


def pairs_from_writer(
    rows: Sequence[ManifestRow],
    writer: Writer,
    faults: list[Fault],
    *,
    seed: int = 0,
    judged: bool = True,
) -> list[ManifestRow]:
    """Pair every row's answer with a wrong one that a language model writes.

    Args:
        judged: ask once more, blindly, which answer the notes support, and keep the pairs where
            that is clearly the chosen one (DIFFA-2 keeps such pairs only).

    Raises:
        DataError: the writer as a whole fails.
    """
    named = {n: (row, _attribute(row, seed)) for n, row in enumerate(rows, 1)}
    for number, (_, name) in named.items():
        if not name:
            faults.append(Fault(number, "knows no attribute to get wrong"))
    usable = {n: (row, name) for n, (row, name) in named.items() if name}
    replies = write_all(writer, [_corruption_turns(row, name) for row, name in usable.values()])
    pairs: dict[int, ManifestRow] = {}
    for (number, (row, name)), reply in zip(usable.items(), replies, strict=True):
        corruption = reply.fault or _parsed(strip_thinking(reply.text), row["target"], name)
        if isinstance(corruption, str):
            faults.append(Fault(number, corruption))
        else:
            pairs[number] = preference_row(row, corruption, f"openqa_{writer.name}_v1")
    if judged:
        pairs = _keep_clear_pairs(pairs, writer, faults, seed)
    faults.sort()
    return list(pairs.values())


def _attribute(row: ManifestRow, seed: int) -> str:
    """Choose what to get wrong: of what the row knows, as often the one as the other."""
    known = [str(name) for name in row.get("attributes") or () if name != "duration"]
    if not known:
        return ""
    return known[derive_seed(seed, str(row.get("audio_id")), row.get("input") or "") % len(known)]


def _row_notes(row: ManifestRow) -> str:
    return f"Notes: {row.get('seed_transcript', '')}\nQuestion: {row.get('input', '')}\n"


def _corruption_turns(row: ManifestRow, attribute: str) -> Conversation:
    what = "one word of what is said" if attribute == "text" else f"the {attribute}"
    prompt = f"{_row_notes(row)}Right answer: {row['target']}"
    return conversation(prompt, CORRUPTION_PROMPT.format(attribute=what))


def _parsed(text: str, target: str, attribute: str) -> Corruption | str:
    """Read a forger's JSON, fenced or not; a text says why the pair is of no use."""
    inner = re.search(r"\{.*\}", text, flags=re.DOTALL)
    try:
        fields = parse_json(inner[0]) if inner else {}
    except ValueError:
        fields = {}
    rejected = fields.get("rejected")  # what is between braces is a mapping
    if not isinstance(rejected, str):
        return f"the reply is not the JSON asked for: {text[:80]!r}"
    if reason := answer_fault(rejected):
        return f"the rejected answer {reason}"
    if " ".join(rejected.lower().split()) == " ".join(target.lower().split()):
        return "the rejected answer is the chosen one"
    longer = len(rejected.split()) / max(len(target.split()), 1)
    if not 0.5 <= longer <= 2:  # length alone would tell the two apart
        return f"the rejected answer is {longer:.1f} times as long as the chosen one"
    return Corruption(rejected.strip(), attribute, str(fields.get("explanation") or attribute))


def _keep_clear_pairs(
    pairs: dict[int, ManifestRow], writer: Writer, faults: list[Fault], seed: int
) -> dict[int, ManifestRow]:
    turns, right = [], []
    for row in pairs.values():
        first = derive_seed(seed, "order", str(row.get("audio_id"))) % 2  # no side is always right
        answers = (row["chosen"], row["rejected"])[:: -1 if first else 1]
        prompt = f"{_row_notes(row)}A: {answers[0]}\nB: {answers[1]}"
        turns.append(conversation(prompt, JUDGE_PROMPT))
        right.append("B" if first else "A")
    clear: dict[int, ManifestRow] = {}
    replies = write_all(writer, turns)
    for (number, row), reply, letter in zip(pairs.items(), replies, right, strict=True):
        verdict = re.match(r"\W*([ABC])\b", strip_thinking(reply.text))
        if verdict and verdict[1] == letter:
            clear[number] = row
        else:
            reason = reply.fault or f"the judge said {reply.text[:20]!r}"
            faults.append(Fault(number, f"the chosen answer is not clearly better: {reason}"))
    return clear
