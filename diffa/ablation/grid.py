"""Every combination of the axes and every seed: runs, and the trainings that they share."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffa.ablation.overrides import override
from diffa.ablation.vary import GridAxis
from diffa.errors import DiffaError, SpecError
from diffa.spec.spec import Spec
from diffa.trainers.config import Recipe

# Metrics of ``evaluate`` that depend on generated answers, and so on the sampler.
_GENERATED = ("exact", "error")


class GridRun(NamedTuple):
    """One combination of values with one seed.

    Attributes:
        labels: The label of each axis's value, by path.
        seed: Seed of the recipe.
        recipe: The recipe with these values.
        spec_digest: Digest of its spec.
        training: Id of the training; runs that differ only in decoding share it.
        name: Name of the run's result.
    """

    labels: dict[str, str]
    seed: int
    recipe: Recipe
    spec_digest: str
    training: str
    name: str

    @property
    def description(self) -> str:
        """The labels in one line."""
        return describe(self.labels)


def describe(labels: dict[str, str]) -> str:
    """Return labels in one line: ``backbone=llada, adapters=both``."""
    return ", ".join(f"{path}={label}" for path, label in labels.items())


def make_grid(recipe: Recipe, axes: Sequence[GridAxis], seeds: int) -> list[GridRun]:
    """Return a run for every combination and seed, seeds innermost.

    Raises:
        SpecError: There are no seeds, or a combination does not fit together.
    """
    if seeds < 1:
        raise SpecError(f"--seeds must be at least 1, got {seeds}")
    runs = []
    for values in itertools.product(*(axis.values for axis in axes)):
        labels = {axis.path: value.label for axis, value in zip(axes, values, strict=True)}
        changed = recipe
        for axis, value in zip(axes, values, strict=True):
            try:
                changed = override(changed, axis.path, value.value)
            except DiffaError as error:
                raise SpecError(f"--vary {axis.path}, at {describe(labels)}: {error}") from error
        runs += [_grid_run(changed, labels, recipe.config.seed + i) for i in range(seeds)]
    return runs


def _grid_run(recipe: Recipe, labels: dict[str, str], seed: int) -> GridRun:
    data = copy.deepcopy(recipe.data)
    data["seed"] = seed
    recipe = Recipe(data, recipe.folder)
    spec = recipe.spec.resolve()
    training = _hash([training_recipe(recipe).data, str(recipe.folder)])
    name = f"{spec.digest()}-{_hash([{**data, 'spec': spec.data}, training])[:8]}"
    return GridRun(labels, seed, recipe, spec.digest(), training, name)


def training_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe without what affects decoding only.

    Evaluations go unless they select the weights, and the sampler goes unless generated answers
    select them.
    """
    data = copy.deepcopy(recipe.data)
    spec = recipe.spec.resolve().data
    del spec["sampler_presets"]
    needs_sampler = False
    for raw, stage in zip(data["stages"], recipe.stages, strict=True):
        if not stage.load_best_model_at_end:
            raw.pop("evaluate", None)
        elif stage.evaluate is not None:
            needs_sampler |= stage.evaluate.best_metric in _GENERATED
    if not needs_sampler:
        del spec["sampler"]
        del spec["prompt"]["max_tokens"]
    data["spec"] = Spec(spec).data
    return Recipe(data, recipe.folder)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
