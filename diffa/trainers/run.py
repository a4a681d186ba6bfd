"""Run a recipe: stage after stage, each resumable at any checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from diffa.assembly import parse_device
from diffa.build import build
from diffa.data.samples import CheckedSource, OnError
from diffa.data.sources import SourceFactory
from diffa.model import Model
from diffa.save import save
from diffa.spec.spec import Spec
from diffa.trainers.checkpoints import (
    WEIGHTS,
    TrainingError,
    checkpoints,
    keep_weights,
    latest,
    load_json,
    load_weights,
    save_json,
    step_of,
)
from diffa.trainers.config import Recipe, stage_part
from diffa.trainers.config_sections import Evaluation, Stage
from diffa.trainers.distributed import is_split, leads, own, wait
from diffa.trainers.estimate import Estimate, estimate, tokenizer_of
from diffa.trainers.evaluate import Best, Evaluator
from diffa.trainers.session import Setting, mixture, open_data, steps_of
from diffa.trainers.stage import loop
from diffa.trainers.trainable import count, learned, staged
from diffa.trainers.trainer import Loop, restore


class StageReport(NamedTuple):
    """How a stage went, or would go: steps, rows per epoch, what learns, and its numbers.

    ``estimate`` is what a dry run foresees.
    """

    name: str
    folder: Path
    steps: int
    rows: int
    learning: int
    metrics: dict[str, float]
    skipped: int
    estimate: Estimate | None = None


class Report(NamedTuple):
    """How a run went: its stages, and the trained model (None after a dry run)."""

    stages: list[StageReport]
    model: Model | None
    folder: Path


def train(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    resume: bool | str | os.PathLike[str] = False,
    dry_run: bool = False,
    overrides: Sequence[str] = (),
    on_error: OnError = "stop",
    device: str | torch.device | None = None,
    sources: Mapping[str, SourceFactory] | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
    console: Console | None = None,
) -> Report:
    """Train what a recipe says and write stages, checkpoints and the model below ``out``.

    Args:
        recipe: a mapping, a file, or a recipe that diffa ships.
        out: the run's folder; the trained model is saved as its ``model``.
        resume: go on where a run in ``out`` stopped, or at the checkpoint that is named.
        dry_run: check everything and report what would happen; weights are neither loaded nor
            learned.
        overrides: changes such as ``stages.0.steps=100``.
        on_error: leave unusable rows out, counted and listed (``skip``), or ``stop``.
        device: where to train; a GPU if there is one.
        sources: generators of samples by name, besides diffa's own.
        evaluators: functions of the model that recipes may name in ``evaluate.by``.
        console: where to show progress.

    Raises:
        SpecError: the recipe has faults.
        DataError: training data is unusable.
        TrainingError: the run cannot start, go on or be saved.
    """
    checked = Recipe.read(recipe).change(overrides)
    place = own(parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    setting = Setting(
        recipe=checked,
        out=Path(out).expanduser(),
        device=place,
        console=console or Console(stderr=True, quiet=not leads()),
        on_error=on_error,
        sources=sources or {},
        evaluators=evaluators or {},
    )
    chosen = Path(resume) if isinstance(resume, str | os.PathLike) else None
    back = None if chosen is None else _stage_of(setting, chosen)
    if dry_run:
        model = prepare(setting, torch.device("meta"))
        model.backbone.tokenizer = tokenizer_of(model)
        return Report(_plan(setting, model), None, setting.out)
    if leads():
        _claim(setting, bool(resume))
    model = prepare(setting, place)
    reports = []
    for number in range(len(checked.stages)):
        again = bool(resume) and (back is None or number < back)
        start = chosen if number == back else None
        reports.append(_stage(setting, model, number, again=again, start=start))
        if is_split(model):
            model = _renewed(setting, place, number + 1)
    final = finished(setting, model)
    if leads():
        save(final, setting.out / "model")
    return Report(reports, final, setting.out)


def _stage_of(setting: Setting, checkpoint: Path) -> int:
    """Return which stage a checkpoint belongs to; raises TrainingError."""
    folders = [stage_folder(setting, n).resolve() for n in range(len(setting.recipe.stages))]
    place = checkpoint.expanduser().resolve()
    if place.parent not in folders or place not in [p.resolve() for p in checkpoints(place.parent)]:
        raise TrainingError(f"{checkpoint} is no checkpoint of the run in {setting.out}")
    return folders.index(place.parent)


def prepare(setting: Setting, device: torch.device) -> Model:
    """Build the recipe's model, its adapters drawn from the recipe's seed."""
    spec = setting.recipe.spec
    assert spec is not None  # the recipe was checked
    if setting.recipe.head.checkpointing:
        spec = spec.set("backbone.gradient_checkpointing", True)
    trained = {name for stage in setting.recipe.stages for name in stage.train}
    torch.manual_seed(setting.recipe.head.seed)
    # what learns needs all the digits that its small steps move
    model = build(spec, device=device, dtype=torch.float32 if "backbone" in trained else None)
    if "backbone.lora" in trained:  # by a stage, if not by the spec
        model.get_submodule("backbone.lora").float()
    return model


def finished(setting: Setting, model: Model) -> Model:
    """Return the model as the last stage sees it; everything that ever learned will be saved."""
    stages = setting.recipe.stages
    seen = staged(model, stages[-1])
    adapters = set(seen.spec.data["adapters"])
    trained = dict.fromkeys(name for stage in stages for name in stage.train)
    kept = [n for n in trained if n.partition(".")[0] != "adapters" or n == "adapters"]
    kept += [n for n in trained if n not in kept and n.removeprefix("adapters.") in adapters]
    seen.spec = Spec.read(seen.spec.data | {"train": kept}).resolve()
    return seen.eval()


def stage_folder(setting: Setting, number: int) -> Path:
    """Return where a stage's checkpoints, log and weights are."""
    return setting.out / f"{number + 1}-{setting.recipe.stages[number].name}"


def _plan(setting: Setting, model: Model) -> list[StageReport]:
    """Say what every stage would do."""
    reports = []
    for number, stage in enumerate(setting.recipe.stages):
        mixed = mixture(stage, setting, number, planning=True)
        if stage.evaluate is not None:
            held = stage_part(Evaluation, stage.evaluate)
            open_data(held.data, setting, pairs=stage.kind == "preferences", planning=True)
        per_step = stage.batch * stage.accumulate * setting.planned
        seen = staged(model, stage)
        reports.append(
            StageReport(
                stage.name,
                stage_folder(setting, number),
                steps_of(stage, mixed.size, per_step),
                mixed.size,
                count(seen, learning=True),
                {},
                sum(len(s.faults) for s in mixed.sources if isinstance(s, CheckedSource)),
                estimate(seen, stage, mixed, half=setting.recipe.head.precision != "float32"),
            )
        )
    return reports


def _claim(setting: Setting, resume: bool) -> None:
    """Take the folder for this recipe; refuse one that holds another run."""
    path = setting.out / "recipe.json"
    held = load_json(path)
    if not any(place.is_dir() for place in setting.out.glob("*/")):
        held = None  # a run that failed before its first stage has left nothing to keep
    if resume and held is None:
        setting.console.print(f"{setting.out} holds no run to go on with: beginning one")
    if held is not None and not resume:
        raise TrainingError(
            f"{setting.out} holds a run already: go on with --resume, or choose another --out"
        )
    if held is not None:
        changed = setting.recipe.same_as(held)
        if changed:
            raise TrainingError(
                f"{setting.out} was begun with another recipe; it differs in {', '.join(changed)}"
            )
    save_json(setting.recipe.data, path)


def _stage(
    setting: Setting, model: Model, number: int, *, again: bool, start: Path | None
) -> StageReport:
    """Run a stage from ``start``, or take over what it left behind if it ran before."""
    stage, folder = setting.recipe.stages[number], stage_folder(setting, number)
    seen = staged(model, stage)
    done = load_json(folder / "stage.json") if again else None
    if done is not None:
        restore(seen, load_weights(folder / WEIGHTS), str(folder))
        setting.console.print(f"{stage.name}: done before, {done['steps']} steps")
        return StageReport(folder=folder, **done)
    report = _train(setting, seen, number, latest(folder) if again else start)
    _keep(seen, report, folder, stage)
    return report


def _train(setting: Setting, seen: Model, number: int, start: Path | None) -> StageReport:
    stage, folder = setting.recipe.stages[number], stage_folder(setting, number)
    running, held, evaluation = loop(seen, stage, number, folder, setting)
    if held is not None and evaluation is not None:
        running.held = Best(held, seen, folder, evaluation, fresh=start is None)
    if start is not None:
        setting.console.print(f"{stage.name}: going on from step {step_of(start)}")
    try:
        running.train(resume_from_checkpoint=str(start) if start else None)
    except KeyboardInterrupt:
        kept = latest(folder)
        setting.console.print(f"stopped; {kept or 'nothing'} is kept: go on with --resume")
        raise
    finally:
        running.bar.close()
    metrics = {k: v for row in running.state.log_history for k, v in row.items() if _telling(k)}
    skipped = _report_skipped(running, setting, folder)
    mixed = running.train_dataset.mixture
    learning = count(running.model, learning=True)
    return StageReport(
        stage.name, folder, running.state.max_steps, mixed.size, learning, metrics, skipped
    )


def _telling(key: str) -> bool:
    return key in ("loss", "accuracy") or (key.startswith("eval_") and "runtime" not in key)


def _report_skipped(running: Loop, setting: Setting, folder: Path) -> int:
    """Count rows that were left out, and list them in ``skipped.json``."""
    mixed = running.train_dataset.mixture
    faulty = [
        f"{source.path}: {fault}"
        for source in mixed.sources
        if isinstance(source, CheckedSource)
        for fault in source.faults
    ]
    reasons = sorted({*running.skipped, *faulty})
    if reasons:
        save_json(reasons, folder / "skipped.json")
        setting.console.print(
            f"{len(reasons)} rows were left out, listed in {folder / 'skipped.json'}"
        )
    return len(reasons)


def _keep(trained: Model, report: StageReport, folder: Path, stage: Stage) -> None:
    """Write a stage's outcome: its weights, then the note that it is done."""
    if stage.take == "best":
        best = folder / "best" / WEIGHTS
        restore(trained, load_weights(best), str(best))
    state = learned(trained)
    if leads():
        keep_weights(state, folder / WEIGHTS)
        note = report._asdict()
        del note["folder"], note["estimate"]
        save_json(note, folder / "stage.json")
    wait()  # other processes read it


def _renewed(setting: Setting, device: torch.device, done: int) -> Model:
    """Build the model anew, whole on every process, with what ``done`` stages have learned."""
    model = prepare(setting, device)
    for number, stage in enumerate(setting.recipe.stages[:done]):
        path = stage_folder(setting, number) / WEIGHTS
        restore(staged(model, stage), load_weights(path), str(path))
    return model
