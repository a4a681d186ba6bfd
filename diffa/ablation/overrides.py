"""Write one value of an axis into a recipe: replace a part, leave out adapters, or set a path."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from typing import Any

from diffa.ablation.related_parts import options_to_keep
from diffa.errors import SpecError, suggest
from diffa.spec import registry
from diffa.spec.schema import read_schema
from diffa.spec.spec import Spec
from diffa.spec.validation import SPEC_KEYS
from diffa.trainers.config import Recipe

_ALL_ADAPTERS = ("both", "all")
_PARTS = ("encoder", "backbone", "objective", "sampler")


def override(recipe: Recipe, path: str, value: Any) -> Recipe:
    """Return a recipe with one value changed.

    Args:
        recipe: The recipe.
        path: ``adapters`` for a set of adapters; a kind of part; or a dotted path of the spec or
            the recipe, with ``stages.*`` for all stages.
        value: Names of adapters (``semantic``, ``a+b``, ``both``); a part's name or mapping; or
            any value of the path.

    Raises:
        SpecError: There is no such path, or the value does not fit.
    """
    place = path.removeprefix("spec.")
    if place == "adapters" and isinstance(value, str):
        return _select_adapters(recipe, value)
    if place in _PARTS and isinstance(value, str | Mapping):
        return _replace_part(recipe, place, value)
    if path == "seed":
        raise SpecError("--vary seed: seeds are not compared, they are repeated: --seeds 3")
    if place.partition(".")[0] in SPEC_KEYS and place != "spec":
        return _with_spec(recipe, _spec(recipe).set(place, value))
    paths = [path]
    if path.startswith("stages.*."):
        paths = [path.replace("*", str(i), 1) for i in range(len(recipe.stages))]
    return recipe.change([f"{place}={json.dumps(value)}" for place in paths])


def _spec(recipe: Recipe) -> Spec:
    assert recipe.spec is not None  # a recipe without one is refused when it is read
    return recipe.spec


def _with_spec(recipe: Recipe, spec: Spec, stages: list[dict[str, Any]] | None = None) -> Recipe:
    data = copy.deepcopy(recipe.data)
    data["spec"] = spec.data
    if stages is not None:
        data["stages"] = stages
    return Recipe(data, recipe.folder)


def _select_adapters(recipe: Recipe, text: str) -> Recipe:
    """Keep some adapters, and the stages that still train something."""
    data = _spec(recipe).data
    known = list(data["adapters"])
    names = known if text in _ALL_ADAPTERS else [name.strip() for name in text.split("+")]
    for name in names:
        if name not in known:
            raise SpecError(f"adapters: the spec has no {name!r}{suggest(name, [*known, 'both'])}")
    removed = set(known) - set(names)
    data["adapters"] = {key: part for key, part in data["adapters"].items() if key in names}
    if "train" in data:
        data["train"] = _without(data["train"], removed)
    stages = []
    for stage in copy.deepcopy(recipe.data["stages"]):
        # Every option that names adapters, a learner's options included, loses the removed ones.
        stage = {key: _without(value, removed) for key, value in stage.items()}
        if stage.get("adapters") != [] and stage.get("train"):
            stages.append(stage)
    if not stages:
        raise SpecError(f"adapters={text}: no stage of the recipe trains any of them")
    return _with_spec(recipe, Spec(data), stages)


def _without(value: Any, removed: Collection[str]) -> Any:
    """Return an option without the adapters that it names, as list entries or as keys."""
    if isinstance(value, list):
        return [
            _without(entry, removed)
            for entry in value
            if not (isinstance(entry, str) and entry.removeprefix("adapters.") in removed)
        ]
    if isinstance(value, dict):
        return {key: _without(v, removed) for key, v in value.items() if key not in removed}
    return value


def _replace_part(recipe: Recipe, kind: str, value: str | Mapping[str, Any]) -> Recipe:
    """Replace a part; options of the old one that the new one has too are kept."""
    data = _spec(recipe).data
    if (
        kind == "sampler"
        and isinstance(value, str)
        and value in (data.get("sampler_presets") or {})
    ):
        return _with_spec(recipe, _spec(recipe).set("sampler", value))
    current = data.get(kind)
    old = dict(current) if isinstance(current, Mapping) else {"name": current}
    if isinstance(value, Mapping):
        data[kind] = dict(value)
    elif value != old["name"]:
        known = read_schema(registry.load_part(kind, value)).options
        data[kind] = {"name": value, **options_to_keep(kind, old, value, known)}
    stages = copy.deepcopy(recipe.data["stages"])
    if kind == "backbone":
        _drop_unfit_parts(data, stages)
    return _with_spec(recipe, Spec(data), stages)


def _drop_unfit_parts(data: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """Drop samplers and objectives for another way of decoding; the backbone's defaults follow."""
    decoding = _decoding("backbone", data["backbone"])
    presets = data.get("sampler_presets") or {}
    if isinstance(data.get("sampler"), str) and data["sampler"] in presets:
        data["sampler"] = presets[data["sampler"]]
    data["sampler_presets"] = {
        name: sampler
        for name, sampler in presets.items()
        if _decoding("sampler", sampler) == decoding
    }
    for kind in ("sampler", "objective"):
        if data.get(kind) is not None and _decoding(kind, data[kind]) != decoding:
            del data[kind]
    for stage in stages:
        if stage.get("objective") and _decoding("objective", stage["objective"]) != decoding:
            del stage["objective"]


def _decoding(kind: str, part: Any) -> str:
    name = part["name"] if isinstance(part, Mapping) else part
    cls = registry.load_part(kind, name) if isinstance(name, str) else name
    return str(cls.decoding)
