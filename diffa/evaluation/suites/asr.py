"""Speech recognition: corpus-level word and character errors, by WeNet's rules and Whisper's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffa.evaluation import word_errors as words
from diffa.evaluation.files import as_jsonl
from diffa.evaluation.items import (
    EvaluationError,
    Fields,
    Question,
    Reading,
    Readings,
    Row,
    text_of,
)
from diffa.evaluation.prompts import TRANSCRIBE

REFERENCES = ("reference", "text", "transcription", "transcript", "sentence", "target")
_CUTS: dict[str, Callable[[str], list[str]]] = {
    "official": words.wenet,
    "fixed": words.whisper,
    "cer": words.characters,
}


class ASR:
    """Word error rate by DIFFA-2's protocol, and after Whisper's normaliser; character errors."""

    name = "asr"
    key = "hypothesis"
    prompts: tuple[str, ...] = ("asr@diffa-2",)
    parsers = {  # noqa: RUF012
        "official": "wer@wenet",
        "fixed": "wer@whisper-en" if words.spellings() else "wer@whisper-en/no-spellings",
        "cer": "cer@whisper-basic",
    }
    groups = (("subset",), ("language",))
    metric = "wer"
    lower = True

    def check(self, fields: Fields) -> str:
        """Return what a row lacks; a reference may be empty, but not missing."""
        if reference(fields) is None:
            return f"has no transcript: none of the columns {', '.join(REFERENCES)}"
        return ""

    def ask(self, fields: Fields, prompt: str) -> Question:
        """DIFFA-2's instruction, 128 tokens in one block."""
        return Question(TRANSCRIBE, (), 128, 128)

    def read(self, fields: Fields, draw: random.Random) -> Readings:
        """Errors and words of the reference; WeNet leaves out utterances without a hypothesis."""
        made = {}
        for name, cut in _CUTS.items():
            wanted, said = cut(str(reference(fields))), cut(text_of(fields.get(self.key)))
            found = words.edits(wanted, said)
            skipped = name == "official" and self.key not in fields
            made[name] = Reading(
                " ".join(said) or None,
                0.0 if skipped else float(found.errors),
                0.0 if skipped else float(len(wanted)),
                parts=(0, 0, 0, 1) if skipped else (*found, float(not said)),
            )
        return made

    def missed(self, fields: Fields) -> Readings:
        """Every word of the reference deleted; nothing is known where that is missing too."""
        made = {}
        for name, cut in _CUTS.items():
            count = float(len(cut(str(reference(fields) or ""))))
            made[name] = Reading(None, count, count, parts=(0, count, 0, 1))
        return made

    def summary(self, parser: str, readings: Sequence[Reading]) -> dict[str, Any]:
        """Kinds of errors, and how many answers are empty."""
        names = ("substitutions", "deletions", "insertions", "empty")
        sums = [int(sum(column)) for column in zip(*(r.parts for r in readings), strict=True)]
        return dict(zip(names, sums, strict=True))

    def export(self, rows: Sequence[Row], stem: str) -> dict[str, str]:
        """``id text`` lines of both sides, and JSONL with every column."""
        named = [(str(row.fields.get("id") or row.number), row.fields) for row in rows]
        said = "".join(f"{name} {_line(text_of(f.get(self.key)))}\n" for name, f in named)
        wanted = "".join(f"{name} {_line(str(reference(f) or ''))}\n" for name, f in named)
        return {
            f"{stem}.txt": said,
            f"{stem}-reference.txt": wanted,
            f"{stem}.jsonl": as_jsonl([dict(row.fields) for row in rows]),
        }


def reference(fields: Fields) -> Any:
    """What is said, from the first column that holds it; None where none does."""
    return next((fields[name] for name in REFERENCES if fields.get(name) is not None), None)


def paired(hypotheses: Path, references: str | Path | None) -> list[Row]:
    """Rows from two files of ``id text`` lines, in the order of the references.

    Raises:
        EvaluationError: a file is missing, or hypotheses have ids that references have not.
    """
    if references is None:
        raise EvaluationError(f"{hypotheses} has no transcripts beside it: add --reference FILE")
    said, wanted = _lines(hypotheses), _lines(Path(references).expanduser())
    if unknown := [name for name in said if name not in wanted]:
        raise EvaluationError(f"{hypotheses} has ids that {references} has not: {unknown[:5]}")
    rows = []
    for number, (name, text) in enumerate(wanted.items(), start=1):
        fields = {"id": name, "reference": text}
        rows.append(Row(number, {**fields, **({"hypothesis": said[name]} if name in said else {})}))
    return rows


def _lines(file: Path) -> dict[str, str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read as text: {error}") from error
    split = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return {parts[0]: parts[1] if len(parts) > 1 else "" for parts in split}


def _line(text: str) -> str:
    return " ".join(text.split())
