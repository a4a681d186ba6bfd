"""Between the page's controls and a spec's ``sampler``: both ways, without a browser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffa.errors import DiffaError, SpecError
from diffa.spec import registry
from diffa.spec.docstrings import docstring_summary, option_descriptions
from diffa.spec.schema import Schema, read_schema
from diffa.spec.spec import Spec
from diffa.spec.yaml import parse_yaml

ONE = "one token per forward"
RULES = (ONE, "steps", "threshold", "factor", "entropy_bound")
"""Ways to choose what a forward decides; options of samplers, apart from the first."""
STARTS = {ONE: 1.0, "steps": 8.0, "threshold": 0.9, "factor": 1.0, "entropy_bound": 0.5}
"""A value to begin with for each rule."""
PLAIN = ("block_length", "cache", "temperature", "cfg_scale")
"""Options that have a control of their own."""
CACHES = ("none", "prefix", "dual")


class Chosen(NamedTuple):
    """What the controls of one sampler preset say, in their order on the page."""

    sampler: str = "blockwise"
    block_length: float | None = 32
    rule: str = ONE
    value: float | None = 1.0
    cache: str = "none"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    others: str = ""


def samplers(decoding: str) -> dict[str, str]:
    """Installed samplers for a kind of backbone by name, each with what it does."""
    found: dict[str, str] = {}
    for name in registry.available("sampler"):
        try:
            cls = registry.load_part("sampler", name)
        except DiffaError:  # a broken package is no reason not to show the others
            continue
        if cls.decoding == decoding:
            found[name] = docstring_summary(cls)
    return found


def named(spec: Spec) -> dict[str, dict[str, Any]]:
    """The sampler presets that a resolved spec names, or its own sampler as ``default``."""
    data = spec.data
    offered = data.get("sampler_presets") or {}
    return {**offered} if offered else {"default": data["sampler"]}


def read(spec: Spec, sampler: Mapping[str, Any] | str) -> Chosen:
    """Say a sampler of a spec in the terms of the controls."""
    written = sampler if isinstance(sampler, str) else dict(sampler)
    options: dict[str, Any] = Spec.read(spec.data | {"sampler": written}).resolve().data["sampler"]
    name = options.pop("name")
    offered = _schema(name).options
    rule = next((r for r in RULES[1:] if options.get(r) is not None), ONE)
    covered = {*PLAIN, rule}
    others = {
        key: value
        for key, value in options.items()
        if key not in covered and value != offered[key].default
    }
    start = Chosen()._asdict()
    plain: dict[str, Any] = {key: options.get(key, start[key]) for key in PLAIN}
    value = STARTS[ONE] if rule == ONE else float(options[rule])
    return Chosen(sampler=name, rule=rule, value=value, others=_write(others), **plain)


def write(chosen: Chosen) -> dict[str, Any]:
    """Return the ``sampler`` of a spec that the controls ask for.

    Raises:
        SpecError: the text for further options is no ``name: value`` list, a number is
            missing, or a rule is chosen that the sampler does not have.
    """
    offered = _schema(chosen.sampler).options
    made: dict[str, Any] = {"name": chosen.sampler}
    for key in PLAIN:
        if key in offered:
            made[key] = _filled(key, getattr(chosen, key))
    if "block_length" in made:
        made["block_length"] = int(made["block_length"])
    if chosen.rule != ONE:
        if chosen.rule not in offered:
            raise SpecError(f"the sampler {chosen.sampler!r} has no rule {chosen.rule!r}")
        value = _filled(f"the rule {chosen.rule!r}", chosen.value)
        made[chosen.rule] = int(value) if chosen.rule == "steps" else float(value)
    return made | _parse(chosen.others)


def title(spec: Spec, name: str, chosen: Chosen) -> str:
    """Name what the controls say: the sampler preset they started from, or that it was changed."""
    start = named(spec).get(name)
    same = start is not None and write(read(spec, start)) == write(chosen)
    return name if same else f"{name}, changed"


def offers(sampler: str) -> dict[str, bool]:
    """Which controls mean something to a sampler."""
    options = _schema(sampler).options
    rules = any(rule in options for rule in RULES)
    return {key: key in options for key in PLAIN} | {"rule": rules}


def rules(sampler: str) -> list[str]:
    """The rules that a sampler has."""
    options = _schema(sampler).options
    return [rule for rule in RULES if rule == ONE or rule in options]


def meaning(sampler: str, option: str) -> str:
    """What an option of a sampler does, as a sentence; "" where its author did not say."""
    text = option_descriptions(registry.load_part("sampler", sampler)).get(option, "")
    text = text.replace("``", "").removeprefix("instead, ").rstrip(".")
    return text[:1].upper() + text[1:] + "." if text else ""


def rule_meaning(sampler: str, rule: str) -> str:
    """What a rule does, as a sentence."""
    if rule == ONE:
        return "Every forward decides the token that the model is surest of."
    return meaning(sampler, rule)


def _schema(sampler: str) -> Schema:
    return read_schema(registry.load_part("sampler", sampler))


def _filled(what: str, value: Any) -> Any:
    if value is None:  # a number that was cleared
        raise SpecError(f"{what} needs a value")
    return value


def _parse(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        made = parse_yaml("{" + text.replace("\n", ", ") + "}")
    except SpecError as error:
        raise SpecError(
            f"further options: {error}; write them as suffix_window: 64, stop_at_eos: false"
        ) from error
    if not isinstance(made, dict) or any(
        value is None and f"{key}: null" not in text for key, value in made.items()
    ):
        raise SpecError("further options are written as NAME: VALUE, separated by commas")
    return made


def _write(options: Mapping[str, Any]) -> str:
    words = {True: "true", False: "false", None: "null"}
    return ", ".join(
        f"{key}: {words[value] if isinstance(value, bool | None) else value}"
        for key, value in options.items()
    )
