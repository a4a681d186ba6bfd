"""What the stages of a run share, and where their samples come from."""

from __future__ import annotations

import json
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
from diffa.data.samples import DataError, OnError, Source
from diffa.data.sources import SourceFactory, open_source
from diffa.trainers.config import Recipe, stage_part
from diffa.trainers.config_sections import Data, Stage
from diffa.trainers.estimate import Expected
from diffa.trainers.evaluate import Evaluator

_QUESTIONS = Path(__file__).parent.parent / "assets" / "questions"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every stage of a run shares."""

    recipe: Recipe
    out: Path
    device: torch.device
    console: Console
    on_error: OnError = "stop"
    sources: Mapping[str, SourceFactory] = field(default_factory=dict)
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Devices that train together, as torchrun says."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def planned(self) -> int:
        """Devices that a plan counts with: torchrun's, or those the recipe is written for."""
        return int(os.environ.get("WORLD_SIZE", self.recipe.head.devices or 1))

    @property
    def bf16(self) -> bool:
        """Whether the forward pass runs in bfloat16."""
        wanted = self.recipe.head.precision
        able = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return wanted == "bf16" or (wanted == "auto" and able)


def open_data(
    entries: Sequence[Mapping[str, Any]],
    setting: Setting,
    *,
    pairs: bool = False,
    planning: bool = False,
) -> tuple[list[Source], list[float]]:
    """Open a stage's manifests and generators; what is wrong with a manifest is shown.

    Args:
        entries: the recipe's.
        setting: of the run.
        pairs: whether every row needs a rejected answer.
        planning: let what the recipe expects stand for manifests that are not here.
    """
    sources: list[Source] = []
    weights = []
    for raw in entries:
        entry: Data = stage_part(Data, raw)
        weights.append(entry.weight)
        if entry.source is not None:
            sources.append(open_source(entry.source, entry.options, setting.sources))
            continue
        path = setting.recipe.path(str(entry.path))
        if planning and entry.expects and not path.is_file():
            told = (
                f"{path} is not here: planned with the {entry.expects['rows']:,g} rows it expects"
            )
            setting.console.print(told, markup=False, highlight=False, soft_wrap=True)
            sources.append(Expected(path.name, **entry.expects))
            continue
        manifest = Manifest(
            path,
            target=entry.target,
            question=entry.question,
            folder=entry.folder and str(setting.recipe.path(entry.folder)),
            on_error=setting.on_error,
            probe=entry.probe,
            unique=entry.unique,
            pairs=pairs,
            questions=read_questions(entry.questions, setting.recipe),
        )
        if manifest.faults:
            setting.console.print(manifest.summary(), markup=False, highlight=False)
        sources.append(manifest)
    return sources, weights


def read_questions(name: str | None, recipe: Recipe) -> list[str]:
    """Read a list of questions: a JSON list, text with one per line, or one that diffa ships.

    Raises:
        DataError: there is no such file, or it holds none.
    """
    if name is None:
        return []
    shipped = _QUESTIONS / f"{name}.json"
    path = shipped if shipped.is_file() else recipe.path(name)
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"questions: {path} cannot be read: {error}") from error
    kept = [q.strip() for q in found if isinstance(q, str) and q.strip()]
    if not kept or not isinstance(found, list) or any(not isinstance(q, str) for q in found):
        raise DataError(f"questions: {path} should hold a list of questions")
    return kept


def mixture(stage: Stage, setting: Setting, number: int, *, planning: bool = False) -> Mixture:
    """Return the order of a stage's samples."""
    pairs = stage.kind == "preferences"
    sources, weights = open_data(stage.data, setting, pairs=pairs, planning=planning)
    devices = setting.planned if planning else setting.processes
    return Mixture(
        sources,
        weights,
        batch=stage.batch * stage.accumulate * devices,
        micro=stage.batch,
        grouped=stage.grouped,
        seed=setting.recipe.head.seed * 1009 + number,
    )


def steps_of(stage: Stage, rows: int, per_step: int) -> int:
    """Return how many optimiser steps a stage takes."""
    if stage.steps is not None:
        return stage.steps
    return max(1, math.ceil(float(stage.epochs or 0) * rows / per_step))
