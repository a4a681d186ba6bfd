"""What the stages of a run share, and where their samples come from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffa.data.manifest import Manifest
from diffa.data.mixture import Mixture
from diffa.data.sample import OnError, Source
from diffa.data.sources import Make, open_source
from diffa.trainers.evaluate import Evaluator
from diffa.trainers.recipe import Recipe, stage_part
from diffa.trainers.sections import Data, Stage


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
