"""From a stage of a recipe to everything that runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from diffa.data.augment import Augment
from diffa.data.cache import FeatureCache, identity, layers_read
from diffa.data.collate import Collate
from diffa.data.manifest import Manifest
from diffa.data.mixture import Mixture
from diffa.data.rows import Answering, Hearing, Listening, Row, Stream
from diffa.data.sample import OnError, Sample, Source
from diffa.data.sources import Make, open_source
from diffa.model import Model
from diffa.trainers.evaluate import Evaluator, Held
from diffa.trainers.folder import TrainingError
from diffa.trainers.learner import Answers
from diffa.trainers.loop import Loop
from diffa.trainers.progress import Bar, Log
from diffa.trainers.recipe import Recipe, stage_part
from diffa.trainers.sections import (
    Cache,
    Data,
    Evaluation,
    Optimizer,
    Schedule,
    Stage,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every stage of a run shares."""

    recipe: Recipe
    out: Path
    device: torch.device
    console: Console
    on_error: OnError = "stop"
    sources: Mapping[str, Make] = field(default_factory=dict)
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Devices that train together, as torchrun says."""
        import os

        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def bf16(self) -> bool:
        """Whether the forward pass runs in bfloat16."""
        wanted = self.recipe.head.precision
        able = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return wanted == "bf16" or (wanted == "auto" and able)


def open_data(
    entries: Sequence[Mapping[str, Any]], setting: Setting
) -> tuple[list[Source], list[float]]:
    """Open a stage's manifests and generators; what is wrong with a manifest is shown."""
    sources: list[Source] = []
    weights = []
    for raw in entries:
        entry: Data = stage_part(Data, raw)
        weights.append(entry.weight)
        if entry.source is not None:
            sources.append(open_source(entry.source, entry.options, setting.sources))
            continue
        manifest = Manifest(
            setting.recipe.path(str(entry.path)),
            target=entry.target,
            question=entry.question,
            folder=entry.folder and str(setting.recipe.path(entry.folder)),
            on_error=setting.on_error,
            probe=entry.probe,
            unique=entry.unique,
        )
        if manifest.faults:
            setting.console.print(manifest.summary(), markup=False, highlight=False)
        sources.append(manifest)
    return sources, weights


def mixture(stage: Stage, setting: Setting, number: int) -> Mixture:
    """Return the order of a stage's samples."""
    sources, weights = open_data(stage.data, setting)
    return Mixture(
        sources,
        weights,
        batch=stage.batch * stage.accumulate * setting.processes,
        micro=stage.batch,
        grouped=stage.grouped,
        seed=setting.recipe.head.seed * 1009 + number,
    )


def steps_of(stage: Stage, rows: int, per_step: int) -> int:
    """Return how many optimiser steps a stage takes."""
    if stage.steps is not None:
        return stage.steps
    return max(1, math.ceil(float(stage.epochs or 0) * rows / per_step))


def row_maker(model: Model, stage: Stage, *, altered: bool) -> Callable[[Sample, int], Row]:
    """Return what turns a stage's samples into rows."""
    rate = model.encoder.sample_rate
    augment = Augment(rate, **stage.augment) if altered and stage.augment else None
    if stage.kind == "listening":
        return Listening(Hearing(rate, augment))
    return Answering(
        model.chat,
        model.backbone.vocab,
        Hearing(rate, augment),
        answer_length=stage.answer_length,
        longest=stage.longest,
    )


def learner(model: Model, stage: Stage, mixed: Mixture, setting: Setting) -> nn.Module:
    """Return what a stage optimises."""
    if stage.kind == "listening":
        from diffa.trainers.hearing import Hears

        names = [name for source in mixed.sources for name in getattr(source, "speakers", ())]
        try:
            return Hears(model.encoder, list(dict.fromkeys(names)), **stage.options)
        except TypeError as error:
            raise TrainingError(f"stage {stage.name!r}, options: {error}") from error
    return Answers(model, feature_cache(model, stage, setting))


def feature_cache(model: Model, stage: Stage, setting: Setting) -> FeatureCache | None:
    """Return the cache of the frozen encoder's features, if the stage keeps any."""
    if stage.cache is None:
        return None
    chosen: Cache = stage_part(Cache, stage.cache)
    source = model.encoder.out
    return FeatureCache(
        setting.out / chosen.folder,
        identity(str(model.spec.choices()["encoder"].options), model.encoder),
        layers_read(model.adapters.values(), source),
        source.layers + 1,
        dtype=chosen.dtype,
        gigabytes=chosen.gigabytes,
    )


def held_out(
    model: Model, optimised: nn.Module, stage: Stage, setting: Setting
) -> tuple[Held, Evaluation] | None:
    """Return a stage's evaluation, or None."""
    if stage.evaluate is None:
        return None
    chosen: Evaluation = stage_part(Evaluation, stage.evaluate)
    missing = [name for name in chosen.by if name not in setting.evaluators]
    if missing:
        raise TrainingError(
            f"stage {stage.name!r}: no evaluator {missing[0]!r} was passed to "
            "diffa.trainers.run(evaluators={...})"
        )
    stream = None
    if chosen.data:
        sources, weights = open_data(chosen.data, setting)
        mixed = Mixture(sources, weights, batch=1, micro=1, seed=0)
        rows = min(chosen.rows, mixed.size)
        stream = Stream(mixed, rows, row_maker(model, stage, altered=False), setting.on_error)
    if stage.kind == "listening":
        chosen = stage_part(Evaluation, {**stage.evaluate, "generate": False})
    held = Held(
        optimised,
        model,
        stream,
        Collate(model.backbone.vocab),
        chosen,
        setting.evaluators,
        setting.device,
    )
    return held, chosen


def arguments(stage: Stage, folder: Path, steps: int, setting: Setting) -> TrainingArguments:
    """Translate a stage into what transformers' Trainer asks for."""
    head = setting.recipe.head
    _check_loggers(head.loggers)
    cuda = setting.device.type == "cuda"
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=setting.device.type == "cpu",
        per_device_train_batch_size=stage.batch,
        gradient_accumulation_steps=stage.accumulate,
        max_steps=steps,
        max_grad_norm=stage.clip,
        bf16=setting.bf16,
        seed=head.seed,
        logging_steps=stage.log,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save,
        eval_strategy="steps" if stage.evaluate is not None else "no",
        eval_steps=_every(stage),
        dataloader_num_workers=head.workers,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(head.loggers),
        run_name=f"{setting.out.name}-{stage.name}",
        label_names=[],
    )


def _every(stage: Stage) -> int | None:
    if stage.evaluate is None:
        return None
    return int(stage_part(Evaluation, stage.evaluate).every)


def _check_loggers(names: Sequence[str]) -> None:
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise TrainingError(f"loggers: {name} is not installed: pip install {name}")


def loop(
    model: Model, stage: Stage, number: int, folder: Path, setting: Setting
) -> tuple[Loop, Held | None, Evaluation | None]:
    """Return everything that runs a stage, ready to train."""
    mixed = mixture(stage, setting, number)
    per_step = stage.batch * stage.accumulate * setting.processes
    steps = steps_of(stage, mixed.size, per_step)
    torch.manual_seed(setting.recipe.head.seed * 1009 + number)  # heads are drawn here
    optimised = learner(model, stage, mixed, setting)
    make = row_maker(model, stage, altered=True)
    found = held_out(model, optimised, stage, setting)
    held, chosen = found if found else (None, None)
    made = Loop(
        optimised,
        Stream(mixed, steps * per_step, make, setting.on_error),
        Collate(model.backbone.vocab),
        arguments(stage, folder, steps, setting),
        optimizer=stage_part(Optimizer, stage.optimizer),
        schedule=stage_part(Schedule, stage.schedule),
        keep=setting.recipe.head.keep,
        evaluate=held,
        callbacks=[Bar(stage.name, setting.console), Log(folder / "log.jsonl")],
    )
    made.remove_callback(PrinterCallback)
    return made, held, chosen
