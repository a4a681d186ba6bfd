"""Score a file of predictions in a suite's official format, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffa.errors import SpecError
from diffa.evaluation.files import Table
from diffa.evaluation.items import EvaluationError
from diffa.evaluation.scores import score
from diffa.evaluation.suites import suite


def score_file(
    name: str,
    file: str | Path,
    *,
    subset: str = "",
    reference: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the report on a suite's predictions.

    Args:
        name: of the suite.
        file: predictions in its official format; for voicebench also a folder of such files.
        subset: of voicebench; found from the file's name where empty.
        reference: for asr with ``id text`` lines: the lines of what is said.
        seed: of the official scripts' guesses and of the intervals.

    Raises:
        EvaluationError: the file cannot be read or holds no prediction.
        SpecError: there is no such suite or subset.
    """
    path = Path(file).expanduser()
    if reference is not None and name != "asr":
        raise SpecError("--reference is for asr; other suites keep the truth in the same file")
    if name == "asr" and (reference is not None or path.suffix not in (".json", ".jsonl")):
        from diffa.evaluation.suites.asr import paired

        rows = paired(path, reference)
        return score(suite(name), rows, seed=seed)[0]
    if name == "voicebench" and path.is_dir():
        from diffa.evaluation.suites.voicebench import overall

        return overall(path, seed)
    found = subset or (subset_of(path) if name == "voicebench" else "")
    if name == "voicebench" and not found:
        raise SpecError(f"which part of voicebench is {path.name}? name it with --subset")
    chosen, table = suite(name, found), Table(path)
    keys = {chosen.key, "model_prediction"} if name == "mmau" else {chosen.key}
    if not any(keys & set(row.fields) for row in table.rows):
        raise EvaluationError(f"{path} holds no predictions: no row has {chosen.key!r}")
    if getattr(chosen, "kind", "") in ("open", "qa"):
        judged = any(row.fields.get("score") is not None for row in table.rows)
        if not judged:
            raise EvaluationError(
                f"{path} holds answers without judgements: "
                f"diffa eval judge {path} --url URL --model NAME comes first"
            )
    return score(chosen, table.rows, seed=seed)[0]


def subset_of(path: Path) -> str:
    """VoiceBench's subset that a file's or folder's name contains; empty where none does."""
    from diffa.evaluation.suites.voicebench import SUBSETS

    for part in (path.name, path.parent.name):
        words = f"-{part.lower().replace('.', '-').replace('_', '-')}-"
        for name in sorted(SUBSETS, key=len, reverse=True):
            if f"-{name.replace('_', '-')}-" in words:
                return name
    return ""
