"""Run a recipe: stage after stage, each resumable at any checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from diffa.assembly import parse_device
from diffa.build import build
from diffa.data.samples import CheckedSource, OnError
from diffa.data.sources import SourceFactory
from diffa.model import Model
from diffa.runtime.files import expand, locked
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
    remove_drafts,
    save_json,
    step_of,
)
from diffa.trainers.config import Recipe
from diffa.trainers.distributed import barrier, is_main_process, is_sharded, local_device
from diffa.trainers.estimate import Estimate, estimate, tokenizer_of
from diffa.trainers.evaluate import EvaluationFunction
from diffa.trainers.inputs import claim_inputs
from diffa.trainers.run_context import RunContext, num_steps, open_data, stage_mixture
from diffa.trainers.stage import build_trainer
from diffa.trainers.trainable import num_trained, stage_model, trained_state
from diffa.trainers.trainer import StageTrainer, restore


class StageReport(NamedTuple):
    """How a stage went, or what a dry run expects.

    Attributes:
        name: Name of the stage.
        folder: Folder of its checkpoints, log and weights.
        steps: Optimizer steps.
        rows: Rows per epoch.
        trained: Number of trained parameters.
        metrics: Last value of every metric.
        skipped: Rows that were left out.
        estimate: What a dry run expects it to take.
    """

    name: str
    folder: Path
    steps: int
    rows: int
    trained: int
    metrics: dict[str, float]
    skipped: int
    estimate: Estimate | None = None


class Report(NamedTuple):
    """How a run went: its stages, and the trained model (None after a dry run)."""

    stages: list[StageReport]
    model: Model | None
    folder: Path


def train(
    recipe: Recipe | Mapping[str, object] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    resume: bool | str | os.PathLike[str] = False,
    dry_run: bool = False,
    overrides: Sequence[str] = (),
    on_error: OnError = "stop",
    device: str | torch.device | None = None,
    sources: Mapping[str, SourceFactory] | None = None,
    evaluators: Mapping[str, EvaluationFunction] | None = None,
    console: Console | None = None,
) -> Report:
    """Run a recipe and write stages, checkpoints and the trained model to ``out``.

    Args:
        recipe: A mapping, a file, or a recipe that diffa ships.
        out: Folder of the run; the trained model is saved as its ``model``.
        resume: Continue the run in ``out``, or continue it from the checkpoint at this path.
        dry_run: Check everything and return estimates, without loading weights or training.
        overrides: Changes such as ``stages.0.max_steps=100``.
        on_error: ``skip`` leaves unusable rows out and lists them; ``stop`` raises.
        device: Device. Default: a GPU if there is one.
        sources: Factories of sources by name, besides the installed ones.
        evaluators: Functions of the model that recipes may name in ``evaluate.evaluators``.
        console: Where to show progress. Default: stderr.

    Raises:
        SpecError: The recipe has faults.
        DataError: Training data is unusable.
        TrainingError: The run cannot start, continue or be saved.
    """
    place = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and place.index:
        raise TrainingError(  # of transformers' Trainer
            f"training runs on the first visible GPU: set CUDA_VISIBLE_DEVICES={place.index} and "
            "give --device cuda"
        )
    context = RunContext(
        recipe=Recipe.read(recipe).change(overrides),
        out=expand(out),
        device=local_device(place),
        console=console or Console(stderr=True, quiet=not is_main_process(), markup=False),
        on_error=on_error,
        sources=sources or {},
        evaluators=evaluators or {},
    )
    checkpoint = None if isinstance(resume, bool) else Path(resume)
    checkpoint_stage = None if checkpoint is None else _stage_of(context, checkpoint)
    if dry_run:
        model = build_model(context, torch.device("meta"))
        model.backbone.tokenizer = tokenizer_of(model)
        return Report(_plan(context, model), None, context.out)
    with locked(context.out, "diffa train") if is_main_process() else nullcontext():
        return _run_stages(context, resume, checkpoint, checkpoint_stage)


def _run_stages(
    context: RunContext,
    resume: bool | str | os.PathLike[str],
    checkpoint: Path | None,
    checkpoint_stage: int | None,
) -> Report:
    if is_main_process():
        _claim_folder(context, bool(resume))
    model = build_model(context, context.device)
    reports = []
    for number in range(len(context.recipe.stages)):
        # a named checkpoint continues its own stage and repeats the later ones
        again = bool(resume) and (checkpoint_stage is None or number < checkpoint_stage)
        start = checkpoint if number == checkpoint_stage else None
        reports.append(_run_stage(context, model, number, again=again, start=start))
        if is_sharded(model):
            model = _rebuild(context, number + 1)
    final = final_model(context, model)
    if is_main_process():
        save(final, context.out / "model")
    return Report(reports, final, context.out)


def _stage_of(context: RunContext, checkpoint: Path) -> int:
    """Return which stage a checkpoint belongs to; raises TrainingError."""
    stages = range(len(context.recipe.stages))
    folders = [context.stage_folder(number).resolve() for number in stages]
    path = expand(checkpoint).resolve()
    if path.parent not in folders or path not in [p.resolve() for p in checkpoints(path.parent)]:
        raise TrainingError(f"{checkpoint} is no checkpoint of the run in {context.out}")
    return folders.index(path.parent)


def build_model(context: RunContext, device: torch.device) -> Model:
    """Build the recipe's model; weights without a checkpoint follow from the recipe's seed."""
    spec = context.recipe.spec
    if context.recipe.config.gradient_checkpointing:
        spec = spec.set("backbone.gradient_checkpointing", True)
    trained = {name for stage in context.recipe.stages for name in stage.train}
    torch.manual_seed(context.recipe.config.seed)
    # trained weights stay in float32: bfloat16 would round small updates away
    model = build(spec, device=device, dtype=torch.float32 if "backbone" in trained else None)
    if "backbone.lora" in trained:
        model.get_submodule("backbone.lora").float()
    return model


def final_model(context: RunContext, model: Model) -> Model:
    """Return the last stage's model; its spec names all trained parts, so they are saved."""
    stages = context.recipe.stages
    view = stage_model(model, stages[-1])
    adapters = set(view.spec.data["adapters"])
    trained = dict.fromkeys(name for stage in stages for name in stage.train)
    names = [n for n in trained if n.partition(".")[0] != "adapters" or n == "adapters"]
    names += [n for n in trained if n not in names and n.removeprefix("adapters.") in adapters]
    view.spec = Spec.read(view.spec.data | {"train": names}).resolve()
    return view.eval()


def _plan(context: RunContext, model: Model) -> list[StageReport]:
    """Return what every stage would do."""
    reports = []
    for number, stage in enumerate(context.recipe.stages):
        mixture = stage_mixture(stage, context, number, planning=True)
        if stage.evaluate is not None:
            paired = stage.learner.load().paired
            open_data(stage.evaluate.data, context, paired=paired, planning=True)
        devices = context.planned_devices(stage)
        rows_per_step = stage.batch_size * stage.gradient_accumulation_steps * devices
        view = stage_model(model, stage)
        half = context.recipe.config.precision != "float32"
        reports.append(
            StageReport(
                stage.name,
                context.stage_folder(number),
                num_steps(stage, mixture.size, rows_per_step),
                mixture.size,
                num_trained(view),
                {},
                sum(len(s.faults) for s in mixture.sources if isinstance(s, CheckedSource)),
                estimate(view, stage, mixture, half=half),
            )
        )
    return reports


def _claim_folder(context: RunContext, resume: bool) -> None:
    """Write the recipe to the run's folder; raises TrainingError if another run is there."""
    path = context.out / "recipe.json"
    earlier = load_json(path)
    if not any(folder.is_dir() for folder in context.out.glob("*/")):
        earlier = None  # a run that failed before its first stage has nothing to continue
    if resume and earlier is None:
        context.console.print(f"{context.out} holds no run to go on with: beginning one")
    if earlier is not None and not resume:
        raise TrainingError(
            f"{context.out} holds a run already: go on with --resume, or choose another --out"
        )
    differences = [] if earlier is None else context.recipe.differences(earlier)
    if differences:
        raise TrainingError(
            f"{context.out} was begun with another recipe; it differs in {', '.join(differences)}"
        )
    claim_inputs(context.out, context.recipe, resumed=earlier is not None)
    save_json(context.recipe.data, path)
    for folder in (context.out, *context.out.glob("*/")):
        remove_drafts(folder)


def _run_stage(
    context: RunContext, model: Model, number: int, *, again: bool, start: Path | None
) -> StageReport:
    """Run a stage, or load its weights if ``again`` and it is already complete.

    ``start`` is the checkpoint to continue from; if ``again``, the stage's latest.
    """
    stage, folder = context.recipe.stages[number], context.stage_folder(number)
    view = stage_model(model, stage)
    note = load_json(folder / "stage.json") if again else None
    if note is not None:
        restore(view, load_weights(folder / WEIGHTS), str(folder))
        context.console.print(f"{stage.name}: done before, {note['steps']} steps")
        return StageReport(folder=folder, **note)
    report = _train_stage(context, view, number, latest(folder) if again else start)
    _save_stage(view, report, best=stage.load_best_model_at_end)
    return report


def _train_stage(context: RunContext, model: Model, number: int, start: Path | None) -> StageReport:
    stage, folder = context.recipe.stages[number], context.stage_folder(number)
    devices = stage.devices or context.recipe.config.devices
    if devices is not None and devices != context.num_devices:
        context.console.print(
            f"{stage.name}: batch_size is meant for {devices} devices, this run has "
            f"{context.num_devices}: the global batch differs"
        )
    trainer = build_trainer(model, stage, number, context, resume=start is not None)
    if start is not None:
        context.console.print(f"{stage.name}: going on from step {step_of(start)}")
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    except KeyboardInterrupt:
        checkpoint = latest(folder)
        context.console.print(f"stopped; {checkpoint or 'nothing'} is kept: go on with --resume")
        raise
    finally:
        trainer.progress_bar.close()
    history = trainer.state.log_history
    metrics = {k: v for row in history for k, v in row.items() if _is_metric(k)}
    return StageReport(
        stage.name,
        folder,
        trainer.state.max_steps,
        trainer.train_dataset.mixture.size,
        num_trained(trainer.model),
        metrics,
        _report_skipped(trainer, context, folder),
    )


def _is_metric(key: str) -> bool:
    return key in ("loss", "accuracy") or (key.startswith("eval_") and "runtime" not in key)


def _report_skipped(trainer: StageTrainer, context: RunContext, folder: Path) -> int:
    """Return the number of rows that were left out, and list them in ``skipped.json``."""
    faults = [
        f"{source.path}: {fault}"
        for source in trainer.train_dataset.mixture.sources
        if isinstance(source, CheckedSource)
        for fault in source.faults
    ]
    reasons = sorted({*trainer.skipped, *faults})
    if reasons:
        path = folder / "skipped.json"
        save_json(reasons, path)
        context.console.print(f"{len(reasons)} rows were left out, listed in {path}")
    return len(reasons)


def _save_stage(model: Model, report: StageReport, *, best: bool) -> None:
    """Write a stage's weights, then the note that it is complete."""
    folder = report.folder
    if best:
        path = folder / "best" / WEIGHTS
        restore(model, load_weights(path), str(path))
    state = trained_state(model)
    if is_main_process():
        keep_weights(state, folder / WEIGHTS)
        note = report._asdict()
        del note["folder"], note["estimate"]
        save_json(note, folder / "stage.json")
    barrier()  # other processes read them


def _rebuild(context: RunContext, stages: int) -> Model:
    """Build the model again, unsharded, with the weights of the first ``stages`` stages."""
    model = build_model(context, context.device)
    for number, stage in enumerate(context.recipe.stages[:stages]):
        path = context.stage_folder(number) / WEIGHTS
        restore(stage_model(model, stage), load_weights(path), str(path))
    return model
