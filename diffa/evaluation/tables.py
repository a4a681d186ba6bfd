"""Several runs of one benchmark as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffa.evaluation.items import EvaluationError
from diffa.evaluation.records import SCORES, load_run
from diffa.runtime.files import expand
from diffa.runtime.text import parse_json


def markdown_table(runs: Sequence[str | Path], *, parser: str = "fixed", group: str = "") -> str:
    """Return a table with one column per run: all items with intervals, then one row per group.

    Args:
        runs: Folders of runs of the same suite and data.
        parser: Parser whose scores are shown.
        group: Group column, such as ``task_name``. Default: no groups.

    Raises:
        EvaluationError: A folder holds no finished run, or one of other data or without the group.
    """
    reports = [_load_report(Path(run)) for run in runs]
    for name in ("suite", "data_digest"):
        if len({report[name] for report in reports}) > 1:
            raise EvaluationError(f"these runs differ in {name}: a table would mislead")
    if parser not in reports[0]:
        raise EvaluationError(f"{reports[0]['suite']} has no parser {parser!r}")
    entries = [report[parser] for report in reports]
    metric = next(m for m in ("accuracy", "wer", "score") if m in entries[0])
    lines = [["", "items", *(Path(run).name for run in runs)], ["---", *["---:"] * (len(runs) + 1)]]
    cells = ["{} ({} to {})".format(*map(_cell, (e[metric], *e["interval"]))) for e in entries]
    lines.append(["all", str(reports[0]["items"]), *cells])
    if group:
        groups = [entry["groups"].get(group) for entry in entries]
        if None in groups:
            known = ", ".join(entries[0]["groups"])
            raise EvaluationError(f"there is no group {group!r}; there are: {known}")
        for value, about in groups[0].items():
            cells = [_cell(column[value][metric]) for column in groups]
            lines.append([value, str(about["items"]), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _load_report(run: Path) -> dict[str, Any]:
    load_run(run)  # raises for an unfinished run
    report: dict[str, Any] = parse_json((expand(run) / SCORES).read_text(encoding="utf-8"))
    return report


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
