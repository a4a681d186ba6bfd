"""Run a grid, one process per training, and collect what its cells measure."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffa.ablation.axes import Axis, read_axes
from diffa.ablation.grid import Cell, cells, training
from diffa.ablation.worker import Job, work
from diffa.errors import DiffaError, SpecError
from diffa.trainers.checkpoints import load_json, save_json
from diffa.trainers.config import Recipe


class Study(NamedTuple):
    """A grid and what is known of it.

    Attributes:
        axes: what is varied.
        cells: every combination under every seed.
        results: of the cells that were measured, by name.
        faults: why the others were not, by the name of their training.
        out: the study's folder.
    """

    axes: list[Axis]
    cells: list[Cell]
    results: dict[str, dict[str, Any]]
    faults: dict[str, str]
    out: Path

    def groups(self) -> list[list[Cell]]:
        """Cells that differ in their seed alone, in the order of the grid."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(str(cell.settings), []).append(cell)
        return list(found.values())


def ablate(
    recipe: Recipe | Mapping[Any, Any] | str | os.PathLike[str],
    vary: Sequence[str],
    *,
    out: str | os.PathLike[str],
    seeds: int = 3,
    overrides: Sequence[str] = (),
    score: str | None = None,
    jobs: int = 1,
    device: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Run every combination under every seed; what ``out`` has already is not run again.

    Args:
        recipe: a mapping, a file, or a recipe that diffa ships.
        vary: axes such as ``backbone=llada,llama`` (see ``diffa.ablation.overrides``).
        out: the study's folder; a training that was stopped goes on at its last checkpoint.
        seeds: repetitions: the recipe's seed and the next ones.
        overrides: changes to the recipe that all runs share, such as ``stages.0.steps=100``.
        score: a command with ``{model}`` and ``{json}``, run on every cell's saved model; the
            numbers in the JSON that it writes join those of the last stage's ``evaluate``.
        jobs: processes at once; with 0, trainings run in this process, one after the other.
        device: where to train.
        dry_run: plan and check everything, run nothing.
        say: told of what happens.

    Raises:
        SpecError: the recipe, the axes or a combination have faults.
    """
    if jobs < 0:
        raise SpecError(f"--jobs must be at least 0, got {jobs}")
    if score and not ("{model}" in score.split() and "{json}" in score.split()):
        raise SpecError(f"--score needs the words {{model}} and {{json}}, got {score!r}")
    place = Path(out).expanduser()
    axes = read_axes(vary)
    grid = cells(Recipe.read(recipe).change(overrides), axes, seeds)
    check(grid)
    study = Study(axes, grid, {}, {}, place)
    faults = {} if dry_run else _run(study, score, jobs, device, say)
    return study._replace(results=collect(study), faults=faults)


def check(grid: Sequence[Cell]) -> None:
    """Build every spec of a grid without weights; SpecError where parts do not fit each other."""
    from diffa.build import build

    for cell in {cell.digest: cell for cell in grid}.values():
        try:
            build(cell.recipe.spec, device="meta")  # type: ignore[arg-type]
        except DiffaError as error:
            told = ", ".join(f"{path}={label}" for path, label in cell.settings.items())
            raise SpecError(f"{told} cannot be built: {error}") from error


def collect(study: Study) -> dict[str, dict[str, Any]]:
    """Read the results that there are, by the cells' names."""
    found = {cell.name: load_json(_result(study, cell)) for cell in study.cells}
    return {name: result for name, result in found.items() if result is not None}


def _result(study: Study, cell: Cell) -> Path:
    return study.out / "results" / f"{cell.name}.json"


def _jobs(study: Study, score: str | None, device: str | None) -> Iterator[tuple[str, Job]]:
    """The trainings of cells without a result, or with one that was measured otherwise."""
    shared: dict[str, list[Cell]] = {}
    for cell in study.cells:
        known = load_json(_result(study, cell))
        if known is None or known["score"] != score:
            shared.setdefault(cell.training, []).append(cell)
    for name, wanting in shared.items():
        first = wanting[0].recipe
        job = Job(
            recipe=_sharing(study, training(first)),
            folder=str(first.folder),
            out=str(study.out / "runs" / name),
            cells={cell.name: _sharing(study, cell.recipe) for cell in wanting},
            results=str(study.out / "results"),
            score=score,
            device=device,
        )
        yield name, job


def _sharing(study: Study, recipe: Recipe) -> dict[str, Any]:
    """A recipe's mapping; what frozen encoders hear is kept in one place for all trainings."""
    data = copy.deepcopy(recipe.data)
    features = str((study.out / "features").resolve())
    for stage in data["stages"]:
        if stage.get("cache") is not None:
            stage["cache"] = {"folder": features, **stage["cache"]}
    return data


def _run(
    study: Study, score: str | None, jobs: int, device: str | None, say: Callable[[str], None]
) -> dict[str, str]:
    """Run the trainings that are needed; return the reasons of those that failed."""
    waiting = list(_jobs(study, score, device))
    say(f"{len(study.cells)} cells, {len(waiting)} trainings to run")
    faults: dict[str, str] = {}
    for done, (name, fault) in enumerate(_ended(study, waiting, jobs), start=1):
        if fault:
            faults[name] = fault
        say(f"{done} of {len(waiting)}: {name} {fault or 'done'}")
    return faults


def _ended(
    study: Study, waiting: Sequence[tuple[str, Job]], jobs: int
) -> Iterator[tuple[str, str]]:
    """Run trainings, so many processes at once, and name each as it ends, with what went wrong."""
    left, busy = list(waiting), dict[str, subprocess.Popen[bytes]]()
    while left and not jobs:
        yield _here(*left.pop(0))
    try:
        while left or busy:
            while left and len(busy) < jobs:
                name, job = left.pop(0)
                busy[name] = _start(study, name, job)
            time.sleep(0.05)
            for name in [name for name, process in busy.items() if process.poll() is not None]:
                code = busy.pop(name).returncode
                yield name, _reason(study, name, code) if code else ""
    finally:
        for process in busy.values():
            process.terminate()
            process.wait()


def _here(name: str, job: Job) -> tuple[str, str]:
    try:
        work(job)
    except DiffaError as error:
        return name, f"failed: {error}"
    return name, ""


def _start(study: Study, name: str, job: Job) -> subprocess.Popen[bytes]:
    path = study.out / "jobs" / f"{name}.json"
    save_json(job._asdict(), path)
    with open(_log(study, name), "ab") as log:
        command = [sys.executable, "-m", "diffa.ablation.worker", str(path)]
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _log(study: Study, name: str) -> Path:
    return study.out / "jobs" / f"{name}.log"


def _reason(study: Study, name: str, code: int) -> str:
    lines = _log(study, name).read_text(errors="replace").split("\n")
    told = [line.strip() for line in lines if line.strip()]
    last = told[-1][:300] if told else "it said nothing"
    return f"failed with code {code}: {last} (see {_log(study, name)})"
