"""A study as a table: means over seeds with intervals, parameter counts, paired differences."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffa.ablation.statistics import MeanInterval, mean_interval, paired_interval
from diffa.ablation.study import Study
from diffa.errors import SpecError, suggest

_FIRST = ("exact", "accuracy", "error", "loss")


class SummaryRow(NamedTuple):
    """One combination of values, over its seeds.

    Attributes:
        labels: The label of each axis's value, by path.
        spec_digest: Digest of its spec.
        parameters: Parameters of the whole model.
        trained: Parameters that were trained.
        by_seed: Every metric by seed.
        means: Mean and interval of every metric.
        difference: Difference of the main metric from the first row, paired by seed.
        stages: Stages of its recipe.
        missing: Seeds without a result.
    """

    labels: dict[str, str]
    spec_digest: str
    parameters: int
    trained: int
    by_seed: dict[str, dict[int, float]]
    means: dict[str, MeanInterval]
    difference: MeanInterval | None
    stages: list[str]
    missing: int

    @property
    def label(self) -> str:
        """The values in one line."""
        return ", ".join(self.labels.values())


def metric_names(study: Study, main: str | None = None) -> list[str]:
    """Return every metric that some run has, the main one first.

    Args:
        study: The study.
        main: The main metric. Default: exact answers, accuracy, errors or the loss.

    Raises:
        SpecError: There is no metric of this name.
    """
    names = list(dict.fromkeys(n for r in study.results.values() for n in r["metrics"]))
    if main is not None and names and main not in names:
        raise SpecError(f"--metric: nothing measured is called {main!r}{suggest(main, names)}")
    usual = [name for name in _FIRST if name in names]
    return list(dict.fromkeys([*([main] if main and names else []), *usual, *names]))


def summary_rows(study: Study, main: str | None = None) -> list[SummaryRow]:
    """Return one row per combination, in the order of the grid."""
    names = metric_names(study, main)
    rows: list[SummaryRow] = []
    for runs in study.combinations():
        results = {run.seed: study.results[run.name] for run in runs if run.name in study.results}
        by_seed = {
            name: {s: r["metrics"][name] for s, r in results.items() if name in r["metrics"]}
            for name in names
        }
        example: dict[str, Any] = next(iter(results.values()), {"parameters": {}, "stages": []})
        first = rows[0].by_seed if rows else {}
        row = SummaryRow(
            labels=runs[0].labels,
            spec_digest=runs[0].spec_digest,
            parameters=example["parameters"].get("total", 0),
            trained=example["parameters"].get("trained", 0),
            by_seed=by_seed,
            means={
                name: mean_interval(list(seeds.values()))
                for name, seeds in by_seed.items()
                if seeds
            },
            difference=paired_interval(by_seed[names[0]], first[names[0]])
            if names and first
            else None,
            stages=example["stages"],
            missing=len(runs) - len(results),
        )
        rows.append(row)
    return rows


def study_markdown(study: Study, main: str | None = None) -> str:
    """Return the study as a Markdown table with notes."""
    names, rows = metric_names(study, main), summary_rows(study, main)
    axes = [axis.path for axis in study.axes]
    compared = bool(names) and len(rows) > 1
    columns = [*axes, "runs", "parameters", "trained", *names]
    columns += [f"{names[0]}: difference from the first"] if compared else []
    rule = ["---"] * len(axes) + ["---:"] * (len(columns) - len(axes))
    lines = [_line(columns), _line(rule)]
    for row in rows:
        count = len(row.by_seed[names[0]]) if names else 0
        cells = [*row.labels.values(), str(count), f"{row.parameters:,}", f"{row.trained:,}"]
        cells += [row.means[name].text() if name in row.means else "" for name in names]
        cells += [row.difference.text() if row.difference else ""] if compared else []
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_notes(study, rows)]) + "\n"


def summary_csv(study: Study, main: str | None = None) -> str:
    """Return one line per combination: mean, low and high of every metric."""
    names = metric_names(study, main)
    head = [*(axis.path for axis in study.axes), "digest", "runs", "parameters", "trained"]
    body = []
    for row in summary_rows(study, main):
        count = len(row.by_seed[names[0]]) if names else 0
        cells = [*row.labels.values(), row.spec_digest, count, row.parameters, row.trained]
        for name in names:
            mean = row.means.get(name)
            cells += [mean.mean if mean else "", *((mean and mean.bounds()) or ("", ""))]
        body.append(cells)
    return _csv([*head, *(f"{n} {end}" for n in names for end in ("mean", "low", "high"))], body)


def runs_csv(study: Study, main: str | None = None) -> str:
    """Return one line per run with every metric."""
    names = metric_names(study, main)
    own = ["seed", "digest", "result", "training seconds"]
    head = [*(axis.path for axis in study.axes), *own, *names]
    body = []
    for run in study.runs:
        result = study.results.get(run.name)
        if result is not None:
            metrics = [result["metrics"].get(name, "") for name in names]
            cells = [*run.labels.values(), run.seed, run.spec_digest, run.name, result["seconds"]]
            body.append([*cells, *metrics])
    return _csv(head, body)


def _notes(study: Study, rows: Sequence[SummaryRow]) -> list[str]:
    notes = ["Mean over seeds ± half of Student's 95 % interval; differences are paired by seed."]
    stages = {row.label: ", ".join(row.stages) for row in rows if row.stages}
    if len(set(stages.values())) > 1:
        listed = "; ".join(f"{label}: {names}" for label, names in stages.items())
        notes.append(f"Rows have different stages: {listed}")
    if missing := sum(row.missing for row in rows):
        notes.append(f"{missing} of {len(study.runs)} runs have no result yet.")
    return notes


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *body])
    return text.getvalue()
