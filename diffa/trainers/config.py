"""Recipes: read, check with all faults at once, and change."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffa.data.augment import Augment
from diffa.data.formats import MANIFEST_FIELDS
from diffa.errors import DiffaError, SpecError, suggest
from diffa.runtime.files import expand
from diffa.spec.schema import Report, to_plain
from diffa.spec.spec import Spec
from diffa.spec.yaml import parse_yaml, read_mapping, write_yaml
from diffa.trainers.config_sections import (
    DataConfig,
    RecipeConfig,
    StageConfig,
    fit_options,
    parse_section,
)

_RECIPES = Path(__file__).parent.parent / "assets" / "recipes"


class Recipe:
    """A checked recipe.

    Args:
        data: The recipe's mapping; ``spec`` is a preset, a path or a mapping.
        folder: Where relative paths in the recipe start. Default: the working directory.

    Attributes:
        config: The options of the recipe and its stages.
        spec: The spec that the stages train.

    Raises:
        SpecError: The recipe has faults; lists all of them.
    """

    spec: Spec

    def __init__(self, data: Mapping[Any, Any], folder: Path | None = None) -> None:
        self.data: dict[str, Any] = to_plain(data)
        self.folder = folder or Path.cwd()
        faults: list[str] = []

        def report(path: str, text: str) -> None:
            faults.append(f"{path}: {text}")

        self.config = parse_section(RecipeConfig, self.data, "", report)
        spec = self._read_spec(report)
        for i, stage in enumerate(self.stages):
            _check_stage(stage, f"stages.{i}", spec, report)
        _check_names([stage.name for stage in self.stages], report)
        if faults:
            raise SpecError("invalid recipe:\n" + "\n".join(f"  {fault}" for fault in faults))
        assert spec is not None  # a missing spec is a fault
        self.spec = spec

    @classmethod
    def read(cls, recipe: Recipe | Mapping[Any, Any] | str | os.PathLike[str]) -> Recipe:
        """Read a mapping, a YAML file, or a recipe that diffa ships by its name."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls(recipe)
        path = expand(recipe)
        if path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
            if path.name not in recipes():
                raise SpecError(f"there is no recipe {path.name!r}{suggest(path.name, recipes())}")
            return cls(read_mapping(_RECIPES / f"{path.name}.yaml"))
        return cls(read_mapping(path), path.resolve().parent)

    @property
    def stages(self) -> list[StageConfig]:
        """The stages, in order."""
        return self.config.stages

    def change(self, overrides: Sequence[str]) -> Recipe:
        """Return a recipe with ``path=value`` changes, such as ``stages.0.max_steps=100``.

        A stage is named by its number from 0 or by its name; a path that begins with ``spec.``
        changes the spec. Values are YAML.
        """
        data = copy.deepcopy(self.data)
        for override in overrides:
            path, equals, text = override.partition("=")
            if not equals:
                raise SpecError(f"{override!r} is not PATH=VALUE")
            self._put(data, path.strip(), parse_yaml(text))
        return Recipe(data, self.folder)

    def path(self, name: str) -> Path:
        """Return a path of the recipe: relative ones start at the recipe's folder."""
        return self.folder / expand(os.path.expandvars(name))

    def to_yaml(self) -> str:
        """Write the recipe as YAML."""
        return write_yaml(self.data)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return the dotted paths in which another recipe's mapping differs."""
        mine, theirs = _flat(self.data), _flat(to_plain(other))
        return sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))

    def _read_spec(self, report: Report) -> Spec | None:
        name = self.config.spec
        if not name:
            report("spec", "missing; name a preset, a file, or write the spec out")
            return None
        try:
            if isinstance(name, str) and self.path(name).is_file():
                return Spec.read(self.path(name))
            return Spec.read(name)
        except DiffaError as error:
            report("spec", str(error))
            return None

    def _put(self, data: dict[str, Any], path: str, value: Any) -> None:
        top, _, rest = path.partition(".")
        if top == "spec" and rest:
            written = data["spec"]
            spec = Spec.read(written if isinstance(written, Mapping) else self.spec)
            data["spec"] = spec.set(rest, value).data
            return
        keys = path.split(".")
        if top == "stages" and rest:
            keys[1] = str(self._stage_index(keys[1], path))
        place: Any = data
        for key in keys[:-1]:
            place = (
                place[_index(place, key, path)]
                if isinstance(place, list)
                else (place.setdefault(key, {}))
            )
            if not isinstance(place, dict | list):
                raise SpecError(f"{path}: {key!r} holds a single value")
        place[_index(place, keys[-1], path) if isinstance(place, list) else keys[-1]] = value

    def _stage_index(self, name: str, path: str) -> int:
        names = [stage.name for stage in self.stages]
        if name in names:
            return names.index(name)
        if name.isdigit() and int(name) < len(names):
            return int(name)
        raise SpecError(f"{path}: there is no stage {name!r}{suggest(name, names)}")


def recipes() -> tuple[str, ...]:
    """Return the names of the recipes that diffa ships."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def _index(items: list[Any], key: str, path: str) -> int:
    """Return a list's index from a path's key; raises SpecError."""
    if key.isdigit() and int(key) < len(items):
        return int(key)
    numbers = f"0 to {len(items) - 1}" if items else "nothing"
    raise SpecError(f"{path}: there is no {key}; the list holds {numbers}")


def _check_names(names: Sequence[str], report: Report) -> None:
    if not names:
        report("stages", "missing; a recipe needs at least one")
    for i, name in enumerate(names):
        if not name.replace("-", "").replace("_", "").isalnum():
            report(f"stages.{i}.name", f"letters, digits, - and _ make a name, got {name!r}")
        elif name in names[:i]:
            report(f"stages.{i}.name", f"{name!r} is taken")


def _check_stage(stage: StageConfig, path: str, spec: Spec | None, report: Report) -> None:
    """Check what options ask of each other and of the spec."""
    if (stage.epochs is None) == (stage.max_steps is None):
        report(path, "give either epochs or max_steps")
    if len(stage.optimizer.betas) != 2:
        report(f"{path}.optimizer.betas", f"are two numbers, got {len(stage.optimizer.betas)}")
    if stage.cache is not None and (stage.augment or "encoder" in stage.train):
        report(f"{path}.cache", "needs a frozen encoder and unaltered audio")
    if stage.load_best_model_at_end and stage.evaluate is None:
        report(f"{path}.load_best_model_at_end", "is true, but nothing is evaluated")
    if stage.augment is not None:
        fit_options(Augment, stage.augment, f"{path}.augment", report)
    _check_data(stage.data, f"{path}.data", report)
    if stage.evaluate is not None and (stage.evaluate.data or not stage.evaluate.evaluators):
        _check_data(stage.evaluate.data, f"{path}.evaluate.data", report)
    if spec is not None:
        _check_parts(stage, path, spec, report)
        _check_learner(stage, path, spec, report)


def _check_data(entries: Sequence[DataConfig], path: str, report: Report) -> None:
    if not entries:
        report(path, "missing; give a list of manifests or sources")
    for i, entry in enumerate(entries):
        if (entry.path is None) == (entry.source is None):
            report(f"{path}.{i}", "give either path (a manifest) or source (a generator)")
        if entry.target not in MANIFEST_FIELDS:
            report(f"{path}.{i}.target", f"rows have no field {entry.target!r}")
        if entry.questions is not None and (entry.question is not None or entry.path is None):
            report(f"{path}.{i}.questions", "is for manifests, and without question")
        size = entry.expected_size
        if size is not None and not {"rows", "hours"} <= size.keys() <= {"rows", "hours", "tokens"}:
            report(f"{path}.{i}.expected_size", "give rows and hours, and tokens if known")


def _check_parts(stage: StageConfig, path: str, spec: Spec, report: Report) -> None:
    """Check that the spec has the parts that a stage trains and uses."""
    adapters = adapter_keys(spec)
    known = ["encoder", "adapters", "backbone", *(f"adapters.{key}" for key in adapters)]
    known += ["backbone.lora"] if spec.parts()["backbone"].options.get("lora") else []
    used = adapters if stage.adapters is None else stage.adapters
    for name in used:
        if name not in adapters:
            report(f"{path}.adapters", f"the spec has no {name!r}{suggest(name, adapters)}")
    if not stage.train:
        report(f"{path}.train", "missing; name what is trained, such as [adapters]")
    for name in stage.train:
        if name not in known:
            report(f"{path}.train", f"unknown part {name!r}{suggest(name, known)}")
        elif name.removeprefix("adapters.") in set(adapters) - set(used):
            report(f"{path}.train", f"{name} is trained, but the stage does not use it")


def _check_learner(stage: StageConfig, path: str, spec: Spec, report: Report) -> None:
    """Load the stage's objective, and let the learner check its stage."""
    try:
        if stage.objective is not None:
            spec = spec.set("objective", to_plain(stage.objective)).resolve()
        objective = spec.parts()["objective"].load()
    except DiffaError as error:
        report(f"{path}.objective", str(error).replace("invalid spec:", "").strip())
        return
    stage.learner.load().check(stage, path, spec, objective, report)


def adapter_keys(spec: Spec) -> list[str]:
    """Return the keys of a spec's adapters."""
    return [key.removeprefix("adapters.") for key in spec.parts() if "adapters." in key]


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in pairs for k, v in _flat(one, f"{path}.{key}").items()}
    return {path.lstrip("."): json.dumps(value, sort_keys=True, default=str)}
