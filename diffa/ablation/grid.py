"""Every combination of the axes and every seed: cells, and the trainings that they share."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffa.ablation.axes import Axis
from diffa.ablation.overrides import changed
from diffa.errors import DiffaError, SpecError
from diffa.spec.spec import Spec
from diffa.trainers.config import Recipe

# Numbers of ``evaluate`` that come from writing answers, which a sampler has a say in.
_WRITTEN = ("exact", "error")


class Cell(NamedTuple):
    """One combination of values under one seed.

    Attributes:
        settings: the label of every axis's value, by the axis's path.
        seed: of the recipe.
        recipe: with every value in its place.
        digest: of the spec.
        training: names what is trained; cells that differ in decoding alone share it.
        name: of the cell's result.
    """

    settings: dict[str, str]
    seed: int
    recipe: Recipe
    digest: str
    training: str
    name: str


def cells(recipe: Recipe, axes: Sequence[Axis], seeds: int) -> list[Cell]:
    """Every combination under every seed, seeds innermost.

    Raises:
        SpecError: fewer than one seed, or a combination that does not fit together.
    """
    if seeds < 1:
        raise SpecError(f"--seeds must be at least 1, got {seeds}")
    found = []
    for levels in itertools.product(*(axis.levels for axis in axes)):
        settings = {axis.path: level.label for axis, level in zip(axes, levels, strict=True)}
        made = recipe
        for axis, level in zip(axes, levels, strict=True):
            try:
                made = changed(made, axis.path, level.value)
            except DiffaError as error:
                told = ", ".join(f"{path}={label}" for path, label in settings.items())
                raise SpecError(f"--vary {axis.path}, at {told}: {error}") from error
        found += [cell(made, settings, recipe.head.seed + i) for i in range(seeds)]
    return found


def cell(recipe: Recipe, settings: dict[str, str], seed: int) -> Cell:
    """Name what a recipe trains and decodes under a seed."""
    data = copy.deepcopy(recipe.data)
    data["seed"] = seed
    made = Recipe(data, recipe.folder)
    assert made.spec is not None  # the recipe was checked
    spec = made.spec.resolve()
    train = training(made)
    trained = _hash([train.data, str(recipe.folder)])
    name = f"{spec.digest()}-{_hash([{**data, 'spec': spec.data}, trained])[:8]}"
    return Cell(settings, seed, made, spec.digest(), trained, name)


def training(recipe: Recipe) -> Recipe:
    """What a recipe trains, without what only decodes: no evaluation that chooses no weights, and
    the usual sampler unless weights are chosen by answers that it wrote."""
    data = copy.deepcopy(recipe.data)
    assert recipe.spec is not None  # the recipe was checked
    spec = recipe.spec.resolve().data
    del spec["sampler_presets"]
    decides = False
    for raw, stage in zip(data["stages"], recipe.stages, strict=True):
        if stage.take != "best":
            raw.pop("evaluate", None)
        else:
            decides |= (stage.evaluate or {}).get("best") in _WRITTEN
    if not decides:
        del spec["sampler"]
        del spec["prompt"]["max_tokens"]
    data["spec"] = Spec(spec).data
    return Recipe(data, recipe.folder)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
