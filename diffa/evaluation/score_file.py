"""Score a file of predictions in a suite's official format, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffa.errors import SpecError
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.items import EvaluationError
from diffa.evaluation.scores import score_items
from diffa.evaluation.suites import load_suite
from diffa.evaluation.suites.asr import pair_transcripts
from diffa.evaluation.suites.voicebench import score_folder
from diffa.runtime.files import expand


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
        name: Name of the suite.
        file: Predictions in its official format; for voicebench also a folder of such files.
        subset: Subset of voicebench. Default: the one that the file's name contains.
        reference: For asr with ``id text`` lines: the lines of the reference transcripts.
        seed: Random seed of the official scripts' fallbacks and of the intervals.

    Raises:
        EvaluationError: The file cannot be read or holds no prediction.
        SpecError: There is no such suite or subset.
    """
    path = expand(file)
    if reference is not None and name != "asr":
        raise SpecError("--reference is for asr; other suites keep the truth in the same file")
    if name == "asr" and (reference is not None or path.suffix not in (".json", ".jsonl")):
        return score_items(load_suite(name), pair_transcripts(path, reference), seed=seed)[0]
    if name == "voicebench" and path.is_dir():
        return score_folder(path, seed)
    suite, items = load_suite(name, subset, path), BenchmarkData(path).items
    columns = {suite.response_column, *(["model_prediction"] if name == "mmau" else [])}
    if not any(columns & set(item.fields) for item in items):
        raise EvaluationError(f"{path} holds no predictions: no row has {suite.response_column!r}")
    if suite.needs_judge and not any(item.fields.get("score") is not None for item in items):
        raise EvaluationError(
            f"{path} holds answers without judgements: "
            f"diffa eval judge {path} --url URL --model NAME comes first"
        )
    return score_items(suite, items, seed=seed)[0]
