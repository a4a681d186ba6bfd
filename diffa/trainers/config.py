"""Recipes: read, check with all faults at once, and change."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffa.data.augment import Augment
from diffa.data.formats import MANIFEST_FIELDS
from diffa.errors import DiffaError, SpecError, suggest
from diffa.spec.schema import Report, coerce, read_schema, to_plain
from diffa.spec.spec import Spec
from diffa.spec.yaml import parse_yaml, read_mapping, write_yaml
from diffa.trainers.config_sections import (
    Aids,
    Cache,
    Data,
    Evaluation,
    Head,
    Optimizer,
    Schedule,
    Section,
    Stage,
    check_limits,
    read,
)

_RECIPES = Path(__file__).parent.parent / "assets" / "recipes"


class Recipe:
    """A checked recipe: ``head`` holds what all stages share, ``stages`` one entry each.

    Args:
        data: the recipe's mapping; ``spec`` is a preset, a path or a mapping.
        folder: where relative paths in the recipe start.
    """

    def __init__(self, data: Mapping[Any, Any], folder: Path | None = None) -> None:
        self.data: dict[str, Any] = to_plain(data)
        self.folder = folder or Path.cwd()
        faults: list[str] = []
        self.head = read(Head, self.data, "", lambda w, t: faults.append(f"{w}: {t}"))
        self.spec = self._spec(faults)
        self.stages = [
            _stage(raw, f"stages.{i}", self.spec, lambda w, t: faults.append(f"{w}: {t}"))
            for i, raw in enumerate(self.head.stages)
        ]
        _check_head(self.head, self.stages, faults)
        if faults:
            raise SpecError("invalid recipe:\n" + "\n".join(f"  {fault}" for fault in faults))

    @classmethod
    def read(cls, recipe: Recipe | Mapping[Any, Any] | str | os.PathLike[str]) -> Recipe:
        """Read a mapping, a YAML file, or a recipe that diffa ships by its name."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls(recipe)
        path = Path(recipe).expanduser()
        if path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
            if path.name not in recipes():
                raise SpecError(f"there is no recipe {path.name!r}{suggest(path.name, recipes())}")
            return cls(read_mapping(_RECIPES / f"{path.name}.yaml"))
        return cls(read_mapping(path), path.resolve().parent)

    def change(self, overrides: Sequence[str]) -> Recipe:
        """Return a recipe with ``path=value`` changes, such as ``stages.0.steps=100``.

        A stage is named by its number from 0 or by its name; what begins with ``spec.`` changes
        the spec. Values are YAML.
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
        return self.folder / Path(os.path.expandvars(name)).expanduser()

    def to_yaml(self) -> str:
        """Write the recipe as YAML."""
        return write_yaml(self.data)

    def same_as(self, other: Mapping[str, Any]) -> list[str]:
        """Return the top-level paths in which another recipe's mapping differs."""
        mine, theirs = _flat(self.data), _flat(to_plain(other))
        return sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))

    def _spec(self, faults: list[str]) -> Spec | None:
        named = self.head.spec
        if not named:
            faults.append("spec: missing; name a preset, a file, or write the spec out")
            return None
        try:
            if isinstance(named, str) and (self.path(named)).is_file():
                return Spec.read(self.path(named))
            return Spec.read(named)
        except DiffaError as error:
            faults.append(f"spec: {error}")
            return None

    def _put(self, data: dict[str, Any], path: str, value: Any) -> None:
        top, _, rest = path.partition(".")
        if top == "spec" and rest:
            if self.spec is None:  # the constructor has refused such a recipe
                raise SpecError(f"{path}: there is no spec to change")
            data["spec"] = Spec.read(
                data["spec"] if isinstance(data["spec"], Mapping) else self.spec
            )
            data["spec"] = data["spec"].set(rest, value).data
            return
        if top == "stages" and rest:
            name, _, rest = rest.partition(".")
            number = self._index(name, path)
            rest = f"stages.{number}.{rest}" if rest else f"stages.{number}"
        else:
            rest = path
        where: Any = data
        *inner, last = rest.split(".")
        for key in inner:
            if isinstance(where, list):
                where = where[_place(where, key, path)]
            else:
                where = where.setdefault(key, {})
            if not isinstance(where, dict | list):
                raise SpecError(f"{path}: {key!r} holds a single value")
        where[_place(where, last, path) if isinstance(where, list) else last] = value

    def _index(self, name: str, path: str) -> int:
        names = [stage.name for stage in self.stages]
        if name in names:
            return names.index(name)
        if name.isdigit() and int(name) < len(names):
            return int(name)
        raise SpecError(f"{path}: there is no stage {name!r}{suggest(name, names)}")


def _place(held: list[Any], key: str, path: str) -> int:
    """Return where in a list a path points; raises SpecError."""
    if key.isdigit() and int(key) < len(held):
        return int(key)
    numbers = f"0 to {len(held) - 1}" if held else "nothing"
    raise SpecError(f"{path}: there is no {key}; the list holds {numbers}")


def recipes() -> tuple[str, ...]:
    """Names of the recipes that diffa ships."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def _stage(raw: Any, path: str, spec: Spec | None, report: Report) -> Stage:
    """Check one stage, the sections within it, and what they ask of the spec."""
    stage = read(Stage, raw, path, report)
    check_limits(stage, path, report)
    _section(Optimizer, stage.optimizer, f"{path}.optimizer", report)
    _section(Schedule, stage.schedule, f"{path}.schedule", report)
    _section(Aids, stage.aids, f"{path}.aids", report)
    if stage.cache is not None:
        _section(Cache, stage.cache, f"{path}.cache", report)
    if stage.evaluate is not None:
        held = _section(Evaluation, stage.evaluate, f"{path}.evaluate", report)
        if not held.data and not held.by:
            report(f"{path}.evaluate.data", "missing; give a list of manifests or sources")
        _check_data(held.data, f"{path}.evaluate.data", report)
    if stage.augment is not None:
        _check_options(stage.augment, Augment, f"{path}.augment", report)
    if not stage.data:
        report(f"{path}.data", "missing; give a list of manifests or sources")
    _check_data(stage.data, f"{path}.data", report)
    _check_numbers(stage, path, report)
    if spec is not None:
        _check_parts(stage, path, spec, report)
    return stage


def _section(cls: type[Section], data: Any, path: str, report: Report) -> Section:
    """Read a section and check its numbers."""
    section = read(cls, data, path, report)
    check_limits(section, path, report)
    return section


def _check_data(entries: Sequence[Mapping[str, Any]], path: str, report: Report) -> None:
    for i, raw in enumerate(entries):
        entry = _section(Data, raw, f"{path}.{i}", report)
        if (entry.path is None) == (entry.source is None):
            report(f"{path}.{i}", "give either path (a manifest) or source (a generator)")
        if entry.target not in MANIFEST_FIELDS:
            report(f"{path}.{i}.target", f"rows have no field {entry.target!r}")
        if entry.questions is not None and (entry.question is not None or entry.path is None):
            report(f"{path}.{i}.questions", "is for manifests, and without question")
        expects = entry.expects
        if expects is not None and not (
            {"rows", "hours"} <= expects.keys() <= {"rows", "hours", "tokens"}
            and min(expects.values()) > 0
        ):
            report(f"{path}.{i}.expects", "give rows and hours, and tokens if known, above 0")


def _check_numbers(stage: Stage, path: str, report: Report) -> None:
    if (stage.epochs is None) == (stage.steps is None):
        report(path, "give either epochs or steps")
    if stage.cache is not None and (stage.augment or "encoder" in stage.train):
        report(f"{path}.cache", "needs a frozen encoder and unaltered audio")
    if stage.take == "best" and stage.evaluate is None:
        report(f"{path}.take", "is 'best', but nothing is evaluated")


def _check_parts(stage: Stage, path: str, spec: Spec, report: Report) -> None:
    """Check that what a stage trains and uses is in the spec."""
    adapters = [key.removeprefix("adapters.") for key in spec.parts() if "adapters." in key]
    known = ["encoder", "adapters", "backbone", *(f"adapters.{key}" for key in adapters)]
    known += ["backbone.lora"] if spec.parts()["backbone"].options.get("lora") else []
    used = adapters if stage.adapters is None else stage.adapters
    for name in used:
        if name not in adapters:
            report(f"{path}.adapters", f"the spec has no {name!r}{suggest(name, adapters)}")
    if not stage.train:
        report(f"{path}.train", "missing; name what learns, such as [adapters]")
    for name in stage.train:
        if name not in known:
            report(f"{path}.train", f"unknown part {name!r}{suggest(name, known)}")
        elif name.removeprefix("adapters.") in set(adapters) - set(used):
            report(f"{path}.train", f"{name} would learn, but the stage does not use it")
    if stage.kind == "listening" and stage.train != ["encoder"]:
        report(f"{path}.train", "a listening stage trains [encoder]")
    _check_aids(stage, path, used, report)
    _check_objective(stage, path, spec, report)


def _check_aids(stage: Stage, path: str, used: Sequence[str], report: Report) -> None:
    """Check that aids are for adapters that the stage uses, and change only what it trains."""
    aids: Aids = stage_part(Aids, stage.aids)
    for name in [*aids.say, *aids.match]:
        if name not in used:
            report(f"{path}.aids", f"the stage has no adapter {name!r}{suggest(name, used)}")
    for name in aids.match:
        if name in used and not {"adapters", f"adapters.{name}"} & set(stage.train):
            report(f"{path}.aids.match", f"rescales {name!r}, which the stage does not train")
    if aids.start and "backbone" not in stage.train:
        report(f"{path}.aids.start", "draws the backbone anew, which the stage does not train")
    for name in {"pull", "sharpness"} & stage.aids.keys() if aids.through == "head" else ():
        report(f"{path}.aids.{name}", "is for through: embeddings")


def _check_objective(stage: Stage, path: str, spec: Spec, report: Report) -> None:
    """Check a stage's objective, and that it compares pairs where the stage has pairs."""
    try:
        if stage.objective is not None:
            spec = spec.set("objective", to_plain(stage.objective)).resolve()
        objective = spec.parts()["objective"].load()
    except DiffaError as error:
        report(f"{path}.objective", str(error).replace("invalid spec:", "").strip())
        return
    paired, pairs = getattr(objective, "paired", False), stage.kind == "preferences"
    if pairs and not paired:
        report(f"{path}.objective", "compares no pairs of answers; say objective: vrpo")
    if paired and stage.kind == "answers":
        report(f"{path}.kind", "the objective compares pairs of answers: say kind: preferences")
    if pairs and stage.aids:
        report(f"{path}.aids", "are for stages of kind answers")


def _check_options(options: Mapping[str, Any], cls: type, path: str, report: Report) -> None:
    known = read_schema(cls).options
    for key, value in options.items():
        if key not in known:
            report(f"{path}.{key}", f"unknown option{suggest(key, known)}")
        else:
            coerce(value, known[key].hint, f"{path}.{key}", report)


def _check_head(head: Head, stages: Sequence[Stage], faults: list[str]) -> None:
    if not stages:
        faults.append("stages: missing; a recipe needs at least one")
    names = [stage.name for stage in stages]
    for i, name in enumerate(names):
        plain_name = name.replace("-", "").replace("_", "").isalnum()
        if not plain_name:
            faults.append(f"stages.{i}.name: letters, digits, - and _ make a name, got {name!r}")
        elif name in names[:i]:
            faults.append(f"stages.{i}.name: {name!r} is taken")
    check_limits(head, "", lambda w, t: faults.append(f"{w}: {t}"))


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in pairs for k, v in _flat(one, f"{path}.{key}").items()}
    return {path.lstrip("."): json.dumps(value, sort_keys=True, default=str)}


def stage_part(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """Read a section that the recipe has checked already."""
    return dataclasses.replace(read(cls, data, "", lambda *_: None))
