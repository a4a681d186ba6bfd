"""What the stages of a run share, and where their samples come from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from diffa.data.manifest import Manifest
from diffa.data.mixture import Mixture
from diffa.data.samples import DataError, OnError, Source
from diffa.data.sources import SourceFactory, open_source
from diffa.runtime.text import parse_json
from diffa.trainers.config import Recipe
from diffa.trainers.config_sections import DataConfig, StageConfig
from diffa.trainers.estimate import ExpectedManifest
from diffa.trainers.evaluate import EvaluationFunction

_QUESTIONS = Path(__file__).parent.parent / "assets" / "questions"


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What every stage of a run shares; the fields are the arguments of ``train``."""

    recipe: Recipe
    out: Path
    device: torch.device
    console: Console
    on_error: OnError = "stop"
    sources: Mapping[str, SourceFactory] = field(default_factory=dict)
    evaluators: Mapping[str, EvaluationFunction] = field(default_factory=dict)

    @property
    def num_devices(self) -> int:
        """Devices that train together, as torchrun says."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def planned_devices(self, stage: StageConfig) -> int:
        """Devices that a dry run assumes: torchrun's, or those the stage is written for."""
        devices = stage.devices or self.recipe.config.devices or 1
        return int(os.environ.get("WORLD_SIZE", devices))

    @property
    def bf16(self) -> bool:
        """Whether the forward pass runs in bfloat16."""
        precision = self.recipe.config.precision
        supported = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return precision == "bf16" or (precision == "auto" and supported)

    def stage_folder(self, number: int) -> Path:
        """Return the folder of a stage's checkpoints, log and weights."""
        return self.out / f"{number + 1}-{self.recipe.stages[number].name}"


def open_data(
    entries: Sequence[DataConfig], context: RunContext, *, paired: bool, planning: bool = False
) -> tuple[list[Source], list[float]]:
    """Open manifests and generators; faults of a manifest are shown on the console.

    Args:
        entries: The recipe's entries.
        context: The run.
        paired: Whether every row needs a rejected answer.
        planning: Let ``expected_size`` stand for a manifest that does not exist yet.

    Returns:
        The sources and their weights.
    """
    sources = [_open_entry(entry, context, paired, planning) for entry in entries]
    return sources, [entry.weight for entry in entries]


def _open_entry(entry: DataConfig, context: RunContext, paired: bool, planning: bool) -> Source:
    if entry.source is not None:
        return open_source(entry.source, entry.options, context.sources)
    recipe, console = context.recipe, context.console
    path, size = recipe.path(str(entry.path)), entry.expected_size
    if planning and size and not path.is_file():
        text = f"{path} does not exist: the plan assumes its {size['rows']:,g} expected rows"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return ExpectedManifest(path.name, **size)
    manifest = Manifest(
        path,
        target=entry.target,
        question=entry.question,
        folder=entry.audio_folder and str(recipe.path(entry.audio_folder)),
        on_error=context.on_error,
        probe=entry.check_audio,
        unique=entry.unique_ids,
        pairs=paired,
        questions=load_questions(entry.questions, recipe),
    )
    if manifest.faults:
        console.print(manifest.summary(), markup=False, highlight=False)
    return manifest


def load_questions(name: str | None, recipe: Recipe) -> list[str]:
    """Return a list of questions: a JSON list, text with one per line, or one that diffa ships.

    Raises:
        DataError: There is no such file, or it holds none.
    """
    if name is None:
        return []
    shipped = _QUESTIONS / f"{name}.json"
    path = shipped if shipped.is_file() else recipe.path(name)
    try:
        text = path.read_text(encoding="utf-8")
        entries = parse_json(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"questions: {path} cannot be read: {error}") from error
    if not isinstance(entries, list) or any(not isinstance(entry, str) for entry in entries):
        raise DataError(f"questions: {path} should hold a list of questions")
    questions = [entry.strip() for entry in entries if entry.strip()]
    if not questions:
        raise DataError(f"questions: {path} should hold a list of questions")
    return questions


def stage_mixture(
    stage: StageConfig, context: RunContext, number: int, *, planning: bool = False
) -> Mixture:
    """Return a stage's samples in the order in which they are drawn."""
    paired = stage.learner.load().paired
    sources, weights = open_data(stage.data, context, paired=paired, planning=planning)
    devices = context.planned_devices(stage) if planning else context.num_devices
    return Mixture(
        sources,
        weights,
        batch=stage.batch_size * stage.gradient_accumulation_steps * devices,
        micro=stage.batch_size,
        grouped=stage.group_by_length,
        seed=context.recipe.config.seed * 1009 + number,
    )


def num_steps(stage: StageConfig, rows: int, rows_per_step: int) -> int:
    """Return the number of optimizer steps of a stage whose epoch has ``rows`` rows."""
    if stage.max_steps is not None:
        return stage.max_steps
    return max(1, math.ceil(float(stage.epochs or 0) * rows / rows_per_step))
