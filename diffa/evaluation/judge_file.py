"""Judge a file of VoiceBench responses: the step between its ``main.py`` and ``evaluate.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from diffa.errors import SpecError
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.items import EvaluationError, to_jsonl
from diffa.evaluation.judge import NUM_SAMPLES, SAMPLING, Judge, judge_items
from diffa.evaluation.suites import load_suite
from diffa.evaluation.suites.voicebench import SUBSETS, VoiceBench
from diffa.runtime.files import expand, write_json, write_text


def judge_file(
    file: str | Path,
    judge: Judge,
    *,
    subset: str = "",
    workers: int = 4,
    on_item: Callable[[int, int], None] | None = None,
) -> tuple[Path, list[tuple[int, str]]]:
    """Write ``result-NAME`` beside a file of responses, with the judge's replies in ``score``.

    A JSON file beside it holds the judge's name, the date and the sampling options. Replies are
    cached.

    Returns:
        The file, and number and reason of the rows that the judge did not answer.

    Raises:
        SpecError: The subset is unknown or scored without a judge.
        EvaluationError: The file cannot be read, or the judge answers nothing.
    """
    path = expand(file)
    suite = load_suite("voicebench", subset, path)
    if not suite.needs_judge:
        judged = ", ".join(name for name in SUBSETS if VoiceBench(name).needs_judge)
        raise SpecError(f"{suite.subset} is scored without a judge; these need one: {judged}")
    items = BenchmarkData(path).items
    if broken := [item for item in items if item.fault]:
        raise EvaluationError(f"{path}: row {broken[0].number} {broken[0].fault}")
    date = time.strftime("%Y-%m-%d")
    scored, failed = judge_items(items, judge, workers=workers, on_item=on_item)
    result = path.with_name(f"result-{path.name}")
    write_text(result, to_jsonl([item.fields for item in scored]))
    about = {
        "judge": judge.endpoint.model,
        "url": judge.endpoint.url,
        "date": date,
        "samples": NUM_SAMPLES,
        **SAMPLING,
        "failed": failed,
    }
    write_json(result.with_suffix(".judge.json"), about)
    return result, failed
