"""A study as a table: means over seeds with intervals, parameter counts, paired differences."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffa.ablation.statistics import Interval, interval, paired
from diffa.ablation.study import Study
from diffa.errors import SpecError, suggest

_FIRST = ("exact", "accuracy", "error", "loss")


class Row(NamedTuple):
    """One combination of values, over its seeds.

    Attributes:
        settings: the labels of its values, by axis.
        digest: of its spec.
        parameters: of the whole model, and those that learned.
        trained: see ``parameters``.
        values: every number by seed.
        means: every number's mean and interval.
        against: the main number's difference from the first row, paired by seed.
        stages: the stages that the recipe had for it.
        missing: seeds without a result.
    """

    settings: dict[str, str]
    digest: str
    parameters: int
    trained: int
    values: dict[str, dict[int, float]]
    means: dict[str, Interval]
    against: Interval | None
    stages: list[str]
    missing: int

    @property
    def label(self) -> str:
        """The values in one line."""
        return ", ".join(self.settings.values())


def metrics(study: Study, main: str | None = None) -> list[str]:
    """Every number that some cell has, the main one first: the one named, or else exact answers,
    accuracy, errors, the loss, whichever there is.

    Raises:
        SpecError: nothing is called so.
    """
    names = list(dict.fromkeys(n for r in study.results.values() for n in r["metrics"]))
    if main is not None and names and main not in names:
        raise SpecError(f"--metric: nothing measured is called {main!r}{suggest(main, names)}")
    usual = [name for name in _FIRST if name in names]
    return list(dict.fromkeys([*([main] if main and names else []), *usual, *names]))


def rows(study: Study, main: str | None = None) -> list[Row]:
    """One row per combination, in the order of the grid."""
    names = metrics(study, main)
    found: list[Row] = []
    for cells in study.groups():
        notes = {c.seed: study.results[c.name] for c in cells if c.name in study.results}
        values = {
            name: {s: note["metrics"][name] for s, note in notes.items() if name in note["metrics"]}
            for name in names
        }
        some: dict[str, Any] = next(iter(notes.values()), {"parameters": {}, "stages": []})
        first = found[0].values if found else {}
        row = Row(
            settings=cells[0].settings,
            digest=cells[0].digest,
            parameters=some["parameters"].get("total", 0),
            trained=some["parameters"].get("trained", 0),
            values=values,
            means={name: interval(list(by.values())) for name, by in values.items() if by},
            against=paired(values[names[0]], first[names[0]]) if names and first else None,
            stages=some["stages"],
            missing=len(cells) - len(notes),
        )
        found.append(row)
    return found


def markdown(study: Study, main: str | None = None) -> str:
    """The study as a Markdown table, with a line that says how to read it."""
    names, found = metrics(study, main), rows(study, main)
    axes = [axis.path for axis in study.axes]
    compared = bool(names) and len(found) > 1
    columns = [*axes, "runs", "parameters", "trained", *names]
    columns += [f"{names[0]}: difference from the first"] if compared else []
    lines = [_line(columns), _line(["---"] * len(axes) + ["---:"] * (len(columns) - len(axes)))]
    for row in found:
        counts = [str(len(cells)) for cells in [row.values[names[0]] if names else {}]]
        cells = [*row.settings.values(), *counts, f"{row.parameters:,}", f"{row.trained:,}"]
        cells += [row.means[name].text() if name in row.means else "" for name in names]
        cells += [row.against.text() if row.against else ""] if compared else []
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_notes(study, found)]) + "\n"


def _notes(study: Study, found: Sequence[Row]) -> list[str]:
    notes = [
        "Mean over seeds ± half of Student's 95 % interval; differences are paired by seed.",
        "A cell whose stages differ from the others' names them: "
        + "; ".join(f"{row.label}: {', '.join(row.stages)}" for row in found if row.stages)
        if len({tuple(row.stages) for row in found if row.stages}) > 1
        else "",
    ]
    missing = sum(row.missing for row in found)
    if missing:
        notes.append(f"{missing} of {len(study.cells)} runs have no result yet.")
    return [note for note in notes if note]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def summary_csv(study: Study, main: str | None = None) -> str:
    """One line per combination: mean, low and high of every number."""
    names = metrics(study, main)
    head = [*(axis.path for axis in study.axes), "digest", "runs", "parameters", "trained"]
    body = []
    for row in rows(study, main):
        runs = len(row.values[names[0]]) if names else 0
        cells: list[Any] = [*row.settings.values(), row.digest, runs, row.parameters, row.trained]
        for name in names:
            cells += _bounds(row.means.get(name))
        body.append(cells)
    return _csv([*head, *(f"{n} {end}" for n in names for end in ("mean", "low", "high"))], body)


def runs_csv(study: Study, main: str | None = None) -> str:
    """One line per run, with every number as it was measured."""
    names = metrics(study, main)
    own = ["seed", "digest", "result", "training seconds"]
    head = [*(axis.path for axis in study.axes), *own, *names]
    body = []
    for cell in study.cells:
        note = study.results.get(cell.name)
        if note is not None:
            numbers = [note["metrics"].get(name, "") for name in names]
            told = [*cell.settings.values(), cell.seed, cell.digest, cell.name, note["seconds"]]
            body.append([*told, *numbers])
    return _csv(head, body)


def _bounds(found: Interval | None) -> list[Any]:
    if found is None:
        return ["", "", ""]
    if found.half is None:
        return [found.mean, "", ""]
    return [found.mean, found.mean - found.half, found.mean + found.half]


def _csv(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *body])
    return text.getvalue()
