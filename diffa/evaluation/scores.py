"""Scores of a benchmark: every response read by every parser, nothing left out silently."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from diffa.evaluation.intervals import bootstrap_interval, ratio_of_sums
from diffa.evaluation.items import Fields, Item, ItemScore, ItemScores, Suite

_SUMS = {"accuracy": "correct", "wer": "errors"}  # what the numerator of a metric counts


def score_items(
    suite: Suite, items: Sequence[Item], *, seed: int = 0, resamples: int = 1000
) -> tuple[dict[str, Any], list[ItemScores]]:
    """Score items that hold responses.

    Returns:
        The report and the scores of every item. The report has an entry for each parser: the
        metric (accuracies from 0 to 1), its 95 % bootstrap interval, counts, and the metric by
        group; and it lists invalid items and repeated ids.
    """
    scores, invalid = _parse_items(suite, items, seed)
    report: dict[str, Any] = {"suite": suite.name, "items": len(items), "seed": seed}
    for parser in scores[0]:
        column = [score[parser] for score in scores]
        report[parser] = {
            "parser": suite.parsers[parser],
            **_metric_report(suite, column, resamples, seed),
            **suite.extra_metrics(parser, column),
            "groups": _group_report(suite, items, column),
        }
    report["invalid"] = _reasons(invalid)
    report["duplicates"] = _reasons(duplicate_ids(items))
    return report, scores


def duplicate_ids(items: Iterable[Item]) -> list[tuple[int, str]]:
    """Return number and reason of the items that repeat the id of an earlier one."""
    first: dict[str, int] = {}
    duplicates = []
    for item in items:
        if item.fields.get("id") is not None:
            name = json.dumps(item.fields["id"], sort_keys=True, default=str)
            if name in first:
                duplicates.append((item.number, f"repeats id {name} of row {first[name]}"))
            first.setdefault(name, item.number)
    return duplicates


def round_metric(value: float) -> float | None:
    """Round a number for a report; NaN (nothing was counted) becomes None."""
    return None if math.isnan(value) else round(value, 6)


def _parse_items(
    suite: Suite, items: Sequence[Item], seed: int
) -> tuple[list[ItemScores], list[tuple[int, str]]]:
    """Score every item in order; also return number and reason of invalid items."""
    # Official scripts draw fallbacks from one global generator in the order of the file.
    rng = random.Random(seed)
    scores, invalid = [], []
    for item in items:
        if reason := item.fault or suite.find_fault(item.fields):
            invalid.append((item.number, reason))
            scores.append(suite.score_missing(item.fields))
        else:
            scores.append(suite.score(item.fields, rng))
    return scores, invalid


def _metric_report(
    suite: Suite, scores: Sequence[ItemScore], resamples: int, seed: int
) -> dict[str, Any]:
    numerators, denominators = [s.numerator for s in scores], [s.denominator for s in scores]
    interval = bootstrap_interval(numerators, denominators, resamples=resamples, seed=seed)
    report: dict[str, Any] = {
        suite.metric: round_metric(ratio_of_sums(numerators, denominators)),
        "interval": [round_metric(end) for end in interval],
        _SUMS.get(suite.metric, "sum"): _integer(sum(numerators)),
        "total": _integer(sum(denominators)),
        "excluded": sum(score.denominator == 0 for score in scores),
        "random_answers": sum(score.is_random for score in scores),
        "unparsed": sum(score.answer is None for score in scores),
    }
    if suite.metric == "accuracy":  # excluded items count as wrong here
        report["accuracy_all"] = round_metric(sum(numerators) / len(scores))
    return report


def _group_report(
    suite: Suite, items: Sequence[Item], scores: Sequence[ItemScore]
) -> dict[str, dict[str, Any]]:
    """Return metric and count by value of the suite's group columns."""
    report: dict[str, dict[str, Any]] = {}
    for columns in suite.groups:
        groups: dict[str, list[ItemScore]] = defaultdict(list)
        for item, score in zip(items, scores, strict=True):
            if (name := _group_name(item.fields, columns)) is not None:
                groups[name].append(score)
        if groups:
            report["/".join(columns)] = {
                name: {
                    suite.metric: round_metric(
                        ratio_of_sums([s.numerator for s in group], [s.denominator for s in group])
                    ),
                    "items": len(group),
                }
                for name, group in sorted(groups.items())
            }
    return report


def _group_name(fields: Fields, columns: Sequence[str]) -> str | None:
    if fields.get(columns[0]) is None:
        return None
    return " / ".join(_group_value(fields.get(column)) for column in columns)


def _group_value(value: Any) -> str:
    """Return a group's value; some rows of MMAU hold ``['Reasoning']`` for ``Reasoning``."""
    if isinstance(value, list):
        value = value[0] if value else ""
    return str(value).strip("[]'\" ")


def _reasons(rows: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    return [{"row": number, "reason": reason} for number, reason in rows]


def _integer(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 6)
