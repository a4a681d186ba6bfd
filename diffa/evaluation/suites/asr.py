"""Speech recognition: corpus-level word and character errors, by WeNet's and Whisper's rules."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffa.evaluation.items import (
    EvaluationError,
    Fields,
    Item,
    ItemScore,
    ItemScores,
    Question,
    Suite,
    as_text,
    to_jsonl,
)
from diffa.evaluation.word_errors import (
    british_spellings,
    count_edits,
    wenet_tokens,
    whisper_characters,
    whisper_words,
)
from diffa.runtime.files import expand
from diffa.spec.validation import TRANSCRIBE

_REFERENCES = ("reference", "text", "transcription", "transcript", "sentence", "target")
_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "official": wenet_tokens,
    "fixed": whisper_words,
    "cer": whisper_characters,
}


class ASR(Suite):
    """Word errors by DIFFA-2's protocol and after Whisper's normaliser; character errors."""

    name = "asr"
    response_column = "hypothesis"
    prompts = ("asr@diffa-2",)
    parsers = {  # noqa: RUF012
        "official": "wer@wenet",
        "fixed": "wer@whisper-en" if british_spellings() else "wer@whisper-en/no-spellings",
        "cer": "cer@whisper-basic",
    }
    groups = (("subset",), ("language",))
    metric = "wer"

    def find_fault(self, fields: Fields) -> str:
        """Return what an item lacks; a reference may be empty, but not missing."""
        if _reference(fields) is None:
            return f"has no transcript: none of the columns {', '.join(_REFERENCES)}"
        return ""

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return DIFFA-2's instruction, with 128 tokens in one block."""
        return Question(TRANSCRIBE, (), 128, 128)

    def score(self, fields: Fields, rng: random.Random) -> ItemScores:
        """Count errors and reference words; WeNet excludes utterances without a hypothesis."""
        scores = {}
        for name, tokenize in _TOKENIZERS.items():
            reference = tokenize(str(_reference(fields)))
            hypothesis = tokenize(as_text(fields.get(self.response_column)))
            if name == "official" and self.response_column not in fields:
                scores[name] = ItemScore(None, 0.0, 0.0, counts=(0, 0, 0, 1))
                continue
            edits = count_edits(reference, hypothesis)
            scores[name] = ItemScore(
                " ".join(hypothesis) or None,
                float(edits.errors),
                float(len(reference)),
                counts=(*edits, float(not hypothesis)),
            )
        return scores

    def score_missing(self, fields: Fields) -> ItemScores:
        """Count every reference word as deleted; nothing if there is no reference either."""
        scores = {}
        for name, tokenize in _TOKENIZERS.items():
            count = float(len(tokenize(str(_reference(fields) or ""))))
            scores[name] = ItemScore(None, count, count, counts=(0, count, 0, 1))
        return scores

    def extra_metrics(self, parser: str, scores: Sequence[ItemScore]) -> dict[str, Any]:
        """Return the kinds of errors and the number of empty hypotheses."""
        names = ("substitutions", "deletions", "insertions", "empty")
        columns = zip(*(score.counts for score in scores), strict=True)
        return {name: int(sum(column)) for name, column in zip(names, columns, strict=True)}

    def export(self, items: Sequence[Item], stem: str) -> dict[str, str]:
        """Return ``id text`` lines of both sides, and JSONL with every column."""
        hypotheses, references = "", ""
        for item in items:
            name = item.fields.get("id") or item.number
            hypotheses += f"{name} {_one_line(item.fields.get(self.response_column))}\n"
            references += f"{name} {_one_line(_reference(item.fields))}\n"
        return {
            f"{stem}.txt": hypotheses,
            f"{stem}-reference.txt": references,
            f"{stem}.jsonl": to_jsonl([item.fields for item in items]),
        }


def pair_transcripts(hypotheses: Path, references: str | Path | None) -> list[Item]:
    """Return items from two files of ``id text`` lines, in the order of the references.

    Raises:
        EvaluationError: A file is missing, or there is a hypothesis without a reference.
    """
    if references is None:
        raise EvaluationError(f"{hypotheses} has no transcripts beside it: add --reference FILE")
    responses, truth = _read_lines(hypotheses), _read_lines(expand(references))
    if unknown := [name for name in responses if name not in truth]:
        raise EvaluationError(f"{hypotheses} has ids that {references} has not: {unknown[:5]}")
    items = []
    for number, (name, text) in enumerate(truth.items(), start=1):
        fields = {"id": name, "reference": text}
        if name in responses:
            fields["hypothesis"] = responses[name]
        items.append(Item(number, fields))
    return items


def _reference(fields: Fields) -> Any:
    """Return the reference transcript from the first column that holds it; None without any."""
    return next((fields[name] for name in _REFERENCES if fields.get(name) is not None), None)


def _read_lines(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read as text: {error}") from error
    words = [line.split(maxsplit=1) for line in lines if line.strip()]
    return {parts[0]: "".join(parts[1:]) for parts in words}


def _one_line(text: Any) -> str:
    return " ".join(as_text(text).split())
