"""One value of an axis, written into a recipe: parts exchanged by name, adapters left out."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from diffa.ablation.related_parts import related
from diffa.errors import SpecError, suggest
from diffa.spec import registry
from diffa.spec.schema import read_schema
from diffa.spec.spec import Spec
from diffa.spec.validation import SPEC_KEYS
from diffa.trainers.config import Recipe

_WHOLE = ("both", "all")
_EXCHANGED = ("encoder", "backbone", "objective", "sampler")


def changed(recipe: Recipe, path: str, value: Any) -> Recipe:
    """Return a recipe with one value in its place.

    ``adapters`` takes names of the spec's adapters (``semantic``, ``a+b``, ``both``); a kind of
    part takes a part's name or a whole mapping; anything else is a dotted path of the spec or of
    the recipe, with ``stages.*`` for all stages.

    Raises:
        SpecError: the path leads nowhere, or the value does not fit there.
    """
    place = path.removeprefix("spec.")
    top = place.partition(".")[0]
    if place == "adapters" and isinstance(value, str):
        return _fewer(recipe, value)
    if place in _EXCHANGED and isinstance(value, str | Mapping):
        return _exchanged(recipe, place, value)
    if path == "seed":
        raise SpecError("--vary seed: seeds are not compared, they are repeated: --seeds 3")
    if top in SPEC_KEYS and top != "spec":
        return _with(recipe, spec=_spec(recipe).set(place, value))
    paths = [path]
    if path.startswith("stages.*."):
        paths = [path.replace("*", str(i), 1) for i in range(len(recipe.stages))]
    return recipe.change([f"{place}={json.dumps(value)}" for place in paths])


def _spec(recipe: Recipe) -> Spec:
    assert recipe.spec is not None  # a recipe without one is refused when it is read
    return recipe.spec


def _with(recipe: Recipe, *, spec: Spec, stages: list[dict[str, Any]] | None = None) -> Recipe:
    data = copy.deepcopy(recipe.data)
    data["spec"] = spec.data
    if stages is not None:
        data["stages"] = stages
    return Recipe(data, recipe.folder)


def _fewer(recipe: Recipe, text: str) -> Recipe:
    """Keep some adapters. A stage that is left with none of its own is left out."""
    data = _spec(recipe).data
    known = list(data["adapters"])
    wanted = known if text in _WHOLE else [name.strip() for name in text.split("+")]
    for name in wanted:
        if name not in known:
            raise SpecError(f"adapters: the spec has no {name!r}{suggest(name, [*known, 'both'])}")
    gone = set(known) - set(wanted)
    data["adapters"] = {key: part for key, part in data["adapters"].items() if key in wanted}
    if "train" in data:
        data["train"] = _kept(data["train"], gone)
    stages = [_stage(stage, gone) for stage in copy.deepcopy(recipe.data["stages"])]
    left = [stage for stage in stages if stage is not None]
    if not left:
        raise SpecError(f"adapters={text}: no stage of the recipe trains any of them")
    return _with(recipe, spec=Spec(data), stages=left)


def _stage(stage: dict[str, Any], gone: set[str]) -> dict[str, Any] | None:
    """A stage without some adapters, or None where nothing of it is left."""
    if stage.get("adapters") is not None:
        stage["adapters"] = [key for key in stage["adapters"] if key not in gone]
    train = _kept(stage.get("train", []), gone)
    if stage.get("adapters") == [] or not train:
        return None
    aids = dict(stage.get("aids") or {})
    if "match" in aids:
        aids["match"] = [key for key in aids["match"] if key not in gone]
    if "say" in aids:
        aids["say"] = {key: value for key, value in aids["say"].items() if key not in gone}
    return {**stage, "train": train, **({"aids": aids} if aids else {})}


def _kept(names: list[str], gone: set[str]) -> list[str]:
    return [name for name in names if name.removeprefix("adapters.") not in gone]


def _exchanged(recipe: Recipe, kind: str, value: str | Mapping[str, Any]) -> Recipe:
    """Put another part in its place; of the old one's options, those that still apply stay."""
    data = _spec(recipe).data
    if (
        kind == "sampler"
        and isinstance(value, str)
        and value in (data.get("sampler_presets") or {})
    ):
        return _with(recipe, spec=_spec(recipe).set("sampler", value))
    written = data.get(kind)
    old = dict(written) if isinstance(written, Mapping) else {"name": written}
    if isinstance(value, Mapping):
        data[kind] = dict(value)
    elif value != old["name"]:
        known = read_schema(registry.load_part(kind, value)).options
        data[kind] = {"name": value, **related(kind, old, value, known)}
    stages = copy.deepcopy(recipe.data["stages"])
    if kind == "backbone":
        _follow(data, stages)
    return _with(recipe, spec=Spec(data), stages=stages)


def _follow(data: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """Leave out samplers and objectives that are for the other way of decoding: the usual ones
    under the new backbone take their place."""
    rule = _decoding("backbone", data["backbone"])
    settings = data.get("sampler_presets") or {}
    if isinstance(data.get("sampler"), str) and data["sampler"] in settings:
        data["sampler"] = settings[data["sampler"]]
    data["sampler_presets"] = {k: v for k, v in settings.items() if _decoding("sampler", v) == rule}
    for kind in ("sampler", "objective"):
        if data.get(kind) is not None and _decoding(kind, data[kind]) != rule:
            del data[kind]
    for stage in stages:
        if stage.get("objective") and _decoding("objective", stage["objective"]) != rule:
            del stage["objective"]


def _decoding(kind: str, part: Any) -> str:
    name = part["name"] if isinstance(part, Mapping) else part
    cls = registry.load_part(kind, name) if isinstance(name, str) else name
    return str(cls.decoding)
