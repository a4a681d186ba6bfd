"""Compare two runs of one benchmark, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffa.evaluation.intervals import paired_difference, ratio_of_sums
from diffa.evaluation.items import EvaluationError
from diffa.evaluation.records import load_run
from diffa.evaluation.scores import round_metric


def compare_records(
    a: str | Path, b: str | Path, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return, for each parser, the metrics of both runs and their difference with paired tests.

    Raises:
        EvaluationError: A folder holds no finished run, or the runs answered different rows.
    """
    (header_a, records_a), (header_b, records_b) = load_run(a), load_run(b)
    for name in ("suite", "subset", "data_digest"):
        if header_a.get(name) != header_b.get(name):
            raise EvaluationError(
                f"{a} and {b} are not comparable: {name} is {header_a.get(name)!r} in one and "
                f"{header_b.get(name)!r} in the other"
            )
    if [record["row"] for record in records_a] != [record["row"] for record in records_b]:
        raise EvaluationError(
            f"{a} and {b} hold different rows: {len(records_a)} and {len(records_b)}"
        )
    report: dict[str, Any] = {
        "suite": header_a["suite"],
        "items": len(records_a),
        "header_differences": {
            key: [header_a[key], header_b.get(key)]
            for key in header_a
            if key != "spec" and header_a[key] != header_b.get(key)
        },
    }
    for parser in records_a[0]["scores"]:
        columns_a, columns_b = _columns(records_a, parser), _columns(records_b, parser)
        result = paired_difference(columns_a, columns_b, resamples=resamples, seed=seed)
        report[parser] = {
            "a": round_metric(ratio_of_sums(*columns_a)),
            "b": round_metric(ratio_of_sums(*columns_b)),
            "difference": round_metric(result.value),
            "interval": [round_metric(result.low), round_metric(result.high)],
            "p_permutation": round_metric(result.p),
            "p_mcnemar": None if result.mcnemar is None else round_metric(result.mcnemar),
            "only_a": result.only_a,
            "only_b": result.only_b,
        }
    report["equal_responses"] = sum(
        x["response"] == y["response"] for x, y in zip(records_a, records_b, strict=True)
    )
    return report


def _columns(records: list[dict[str, Any]], parser: str) -> tuple[list[float], list[float]]:
    """Return numerators and denominators of one parser."""
    scores = [record["scores"][parser] for record in records]
    return [s["numerator"] for s in scores], [s["denominator"] for s in scores]
