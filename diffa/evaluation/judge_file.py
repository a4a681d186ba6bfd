"""Judge a file of VoiceBench answers: the step between its ``main.py`` and ``evaluate.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from diffa.errors import SpecError
from diffa.evaluation.files import Table, as_jsonl
from diffa.evaluation.items import EvaluationError
from diffa.evaluation.judge import SAMPLES, SAMPLING, Judge, judge_rows
from diffa.evaluation.score_file import subset_of
from diffa.evaluation.suites.voicebench import JUDGED, SUBSETS
from diffa.runtime.files import write_json, write_text


def needs_judge(suite: str, subset: str) -> bool:
    """Whether a judge has to read a subset's answers before it can be scored."""
    return suite == "voicebench" and SUBSETS[subset].kind in JUDGED


def judge_file(
    file: str | Path,
    judge: Judge,
    *,
    subset: str = "",
    workers: int = 4,
    on_row: Callable[[int, int], None] | None = None,
) -> tuple[Path, list[tuple[int, str]]]:
    """Write ``result-NAME`` beside a file of answers, with three replies of the judge in ``score``.

    A file beside it says which judge it was, when, and how it was asked. Rows that the judge
    would not answer are returned: their numbers and why. What it has answered is not asked again.

    Raises:
        SpecError: the subset is not known, or is scored without a judge.
        EvaluationError: the file cannot be read, or the judge answers nothing.
    """
    path = Path(file).expanduser()
    name = subset or subset_of(path)
    if name not in SUBSETS or SUBSETS[name].kind not in JUDGED:
        known = ", ".join(n for n, about in SUBSETS.items() if about.kind in JUDGED)
        raise SpecError(f"{name or path.name} has no use for a judge; these have: {known}")
    rows = Table(path).rows
    if broken := [row for row in rows if row.fault]:
        raise EvaluationError(f"{path}: row {broken[0].number} {broken[0].fault}")
    begin = time.strftime("%Y-%m-%d")
    judged, failed = judge_rows(rows, judge, workers=workers, on_row=on_row)
    result = path.with_name(f"result-{path.name}")
    write_text(result, as_jsonl([row.fields for row in judged]))
    about = {
        "judge": judge.endpoint.model,
        "url": judge.endpoint.url,
        "date": begin,
        "samples": SAMPLES,
        **SAMPLING,
        "failed": failed,
    }
    write_json(result.with_suffix(".judge.json"), about)
    return result, failed
