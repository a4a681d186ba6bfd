"""Run a grid, one process per training, and collect the results of its runs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffa.ablation.grid import GridRun, make_grid, training_recipe
from diffa.ablation.vary import GridAxis, parse_axes
from diffa.ablation.worker import TrainingJob, run_job
from diffa.errors import DiffaError, SpecError
from diffa.evaluation.intervals import import_scipy_stats
from diffa.runtime.files import expand, locked
from diffa.trainers.checkpoints import load_json, save_json
from diffa.trainers.config import Recipe
from diffa.trainers.inputs import claim_inputs


class Study(NamedTuple):
    """A grid and its results.

    Attributes:
        axes: What is varied.
        runs: Every combination with every seed.
        results: Results of the finished runs, by name.
        faults: Why trainings failed, by the id of the training.
        out: Folder of the study.
    """

    axes: list[GridAxis]
    runs: list[GridRun]
    results: dict[str, dict[str, Any]]
    faults: dict[str, str]
    out: Path

    def combinations(self) -> list[list[GridRun]]:
        """Return the runs that differ only in their seed, in the order of the grid."""
        groups: dict[str, list[GridRun]] = {}
        for run in self.runs:
            groups.setdefault(str(run.labels), []).append(run)
        return list(groups.values())

    def result_path(self, run: GridRun) -> Path:
        """Return the file of a run's result."""
        return self.out / "results" / f"{run.name}.json"

    def load_results(self) -> dict[str, dict[str, Any]]:
        """Load the results in the study's folder, by name of the run."""
        results = {run.name: load_json(self.result_path(run)) for run in self.runs}
        return {name: result for name, result in results.items() if result is not None}


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
    on_message: Callable[[str], None] = lambda text: None,
) -> Study:
    """Run every combination with every seed, except the runs with a result in ``out``.

    Args:
        recipe: A mapping, a file, or a recipe that diffa ships.
        vary: Axes such as ``backbone=llada,llama`` (see ``diffa.ablation.overrides``).
        out: Folder of the study; an interrupted training continues at its last checkpoint.
        seeds: Number of seeds: the recipe's and the next ones.
        overrides: Changes to the recipe for all runs, such as ``stages.0.max_steps=100``.
        score: A command with ``{model}`` and ``{json}``, run on each run's saved model. The
            numbers in its JSON join the metrics of the last stage's ``evaluate``.
        jobs: Processes at once; 0: one training after the other in this process.
        device: Device of the trainings.
        dry_run: Plan and check everything, run nothing.
        on_message: Called with progress messages.

    Raises:
        SpecError: The recipe, the axes or a combination is invalid.
    """
    if jobs < 0:
        raise SpecError(f"--jobs must be at least 0, got {jobs}")
    if score and not ("{model}" in score.split() and "{json}" in score.split()):
        raise SpecError(f"--score needs the words {{model}} and {{json}}, got {score!r}")
    axes = parse_axes(vary)
    runs = make_grid(Recipe.read(recipe).change(overrides), axes, seeds)
    # A combination that cannot be built is told before hours of training.
    _check_builds(runs)
    study = Study(axes, runs, {}, {}, expand(out))
    if not dry_run:
        from diffa.ablation.plot import import_matplotlib

        # Table and plot need these libraries: fail before the trainings, not after them.
        import_scipy_stats()
        import_matplotlib()
        with locked(study.out, "diffa ablate"):
            for run in runs:
                claim_inputs(study.out, run.recipe)
            study = study._replace(faults=_run_trainings(study, score, jobs, device, on_message))
    return study._replace(results=study.load_results())


def _check_builds(runs: Sequence[GridRun]) -> None:
    """Build every spec without weights; raises SpecError if parts do not fit each other."""
    from diffa.build import build

    for run in {run.spec_digest: run for run in runs}.values():
        try:
            build(run.recipe.spec, device="meta")
        except DiffaError as error:
            raise SpecError(f"{run.description} cannot be built: {error}") from error


def _run_trainings(
    study: Study,
    score: str | None,
    jobs: int,
    device: str | None,
    on_message: Callable[[str], None],
) -> dict[str, str]:
    """Run the missing trainings; return why some of them failed."""
    queue = list(_missing_jobs(study, score, device))
    on_message(f"{len(study.runs)} runs, {len(queue)} trainings to run")
    # Results are files, so a stopped study goes on with what is missing.
    finished = _run_processes(study, queue, jobs) if jobs else _run_here(queue)
    faults: dict[str, str] = {}
    for done, (name, fault) in enumerate(finished, start=1):
        if fault:
            faults[name] = fault
        on_message(f"{done} of {len(queue)}: {name} {fault or 'done'}")
    return faults


def _missing_jobs(
    study: Study, score: str | None, device: str | None
) -> Iterator[tuple[str, TrainingJob]]:
    """Yield the trainings of runs without a result, or with one of another score command."""
    shared: dict[str, list[GridRun]] = {}
    # Runs that differ in their sampler alone share a training.
    for run in study.runs:
        result = load_json(study.result_path(run))
        if result is None or result["score"] != score:
            shared.setdefault(run.training, []).append(run)
    for name, runs in shared.items():
        first = runs[0].recipe
        job = TrainingJob(
            recipe=_with_shared_cache(study, training_recipe(first)),
            folder=str(first.folder),
            out=str(study.out / "runs" / name),
            runs={run.name: _with_shared_cache(study, run.recipe) for run in runs},
            results=str(study.out / "results"),
            score=score,
            device=device,
        )
        yield name, job


def _with_shared_cache(study: Study, recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's mapping whose encoder features are cached in one folder for all runs."""
    data = copy.deepcopy(recipe.data)
    features = str((study.out / "features").resolve())
    for stage in data["stages"]:
        if stage.get("cache") is not None:
            stage["cache"] = {"folder": features, **stage["cache"]}
    return data


def _run_here(queue: Sequence[tuple[str, TrainingJob]]) -> Iterator[tuple[str, str]]:
    """Run trainings in this process; yield the id of each, and why it failed."""
    for name, job in queue:
        try:
            run_job(job)
        except DiffaError as error:
            yield name, f"failed: {error}"
        else:
            yield name, ""


def _run_processes(
    study: Study, queue: Sequence[tuple[str, TrainingJob]], jobs: int
) -> Iterator[tuple[str, str]]:
    """Run trainings in ``jobs`` processes; yield the id of each, and why it failed."""
    waiting, running = list(queue), dict[str, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, job = waiting.pop(0)
                running[name] = _start_process(study, name, job)
            time.sleep(0.05)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                yield name, _failure(study, name, code) if code else ""
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _start_process(study: Study, name: str, job: TrainingJob) -> subprocess.Popen[bytes]:
    path = study.out / "jobs" / f"{name}.json"
    save_json(job._asdict(), path)
    with open(_log_path(study, name), "ab") as log:
        command = [sys.executable, "-m", "diffa.ablation.worker", str(path)]
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _log_path(study: Study, name: str) -> Path:
    return study.out / "jobs" / f"{name}.log"


def _failure(study: Study, name: str, code: int) -> str:
    """Return the exit code and the last line of the log."""
    log = _log_path(study, name)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "the log is empty"
    return f"failed with code {code}: {last} (see {log})"
