"""Convert between the page's controls and the ``sampler`` of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffa.errors import DiffaError, SpecError
from diffa.serving.sampler_options import validate_sampler_options
from diffa.spec import registry
from diffa.spec.docstrings import docstring_summary, option_descriptions
from diffa.spec.schema import Schema, describe_type, read_schema
from diffa.spec.spec import Spec
from diffa.spec.yaml import parse_yaml

ONE = "one token per pass"
RULES = (ONE, "steps", "threshold", "factor", "entropy_bound")
"""Rules for the number of tokens per forward pass; all but the first are sampler options."""
STARTS = {ONE: 1.0, "steps": 8.0, "threshold": 0.9, "factor": 1.0, "entropy_bound": 0.5}
"""Initial value of each rule."""
PLAIN = ("block_length", "cache", "temperature", "cfg_scale")
"""Options with a control of their own."""
CACHES = ("none", "prefix", "dual")


class SamplerForm(NamedTuple):
    """Values of the controls of one sampler, in their order on the page."""

    sampler: str = "blockwise"
    block_length: float | None = 32
    rule: str = ONE
    value: float | None = 1.0
    cache: str = "none"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    others: str = ""


def installed_samplers(decoding: str) -> dict[str, str]:
    """Return the installed samplers for a kind of backbone, by name, with their summaries."""
    summaries: dict[str, str] = {}
    for name in registry.available("sampler"):
        try:
            cls = registry.load_part("sampler", name)
        except DiffaError:  # a broken package is no reason not to show the others
            continue
        if cls.decoding == decoding:
            summaries[name] = docstring_summary(cls)
    return summaries


def sampler_presets(spec: Spec) -> dict[str, dict[str, Any]]:
    """Return the sampler presets of a resolved spec, or its sampler as ``default``."""
    data = spec.data
    offered = data.get("sampler_presets") or {}
    return {**offered} if offered else {"default": data["sampler"]}


def form_from_sampler(spec: Spec, sampler: Mapping[str, Any] | str) -> SamplerForm:
    """Return the controls' values for a sampler of a spec."""
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
    start = SamplerForm()._asdict()
    plain: dict[str, Any] = {key: options.get(key, start[key]) for key in PLAIN}
    value = STARTS[ONE] if rule == ONE else float(options[rule])
    return SamplerForm(sampler=name, rule=rule, value=value, others=_write(others), **plain)


def sampler_from_form(form: SamplerForm) -> dict[str, Any]:
    """Return the ``sampler`` of a spec for the controls' values.

    Raises:
        SpecError: the text for further options is no ``name: value`` list, a number is
            missing, or a rule is chosen that the sampler does not have.
        RequestError: an option is unknown or out of the server's bounds: no visitor may occupy
            the model for the others.
    """
    offered = _schema(form.sampler).options
    options: dict[str, Any] = {"name": form.sampler}
    for key in PLAIN:
        if key in offered:
            options[key] = _filled(key, getattr(form, key))
    if "block_length" in options:
        options["block_length"] = int(options["block_length"])
    if form.rule != ONE:
        if form.rule not in offered:
            raise SpecError(f"the sampler {form.sampler!r} has no rule {form.rule!r}")
        value = _filled(f"the rule {form.rule!r}", form.value)
        options[form.rule] = int(value) if form.rule == "steps" else float(value)
    options |= _parse(form.others)
    validate_sampler_options(form.sampler, options, "sampler")
    return options


def form_title(spec: Spec, name: str, form: SamplerForm) -> str:
    """Return the preset's name, with "changed" if the controls differ from it."""
    start = sampler_presets(spec).get(name)
    same = start is not None and sampler_from_form(
        form_from_sampler(spec, start)
    ) == sampler_from_form(form)
    return name if same else f"{name}, changed"


def visible_controls(sampler: str) -> dict[str, bool]:
    """Return which controls a sampler has options for."""
    options = _schema(sampler).options
    rules = any(rule in options for rule in RULES)
    return {key: key in options for key in PLAIN} | {"rule": rules}


def available_rules(sampler: str) -> list[str]:
    """Return the rules that a sampler has options for."""
    options = _schema(sampler).options
    return [rule for rule in RULES if rule == ONE or rule in options]


def describe_option(sampler: str, option: str) -> str:
    """Return the description of a sampler's option as a sentence; "" if it has none."""
    text = option_descriptions(registry.load_part("sampler", sampler)).get(option, "")
    text = text.replace("``", "").removeprefix("instead, ").rstrip(".")
    return text[:1].upper() + text[1:] + "." if text else ""


def describe_further_options(sampler: str) -> str:
    """List the options of a sampler that have no control of their own, for their text box."""
    options = _schema(sampler).options
    further = {key: option for key, option in options.items() if key not in (*PLAIN, *RULES)}
    if not further:
        return "This sampler has no further options."
    names = ", ".join(f"{key} ({describe_type(option.hint)})" for key, option in further.items())
    return f"Options as NAME: VALUE, separated by commas: {names}."


def describe_rule(sampler: str, rule: str) -> str:
    """Return the description of a rule as a sentence."""
    if rule == ONE:
        return "Each pass unmasks the most confident token."
    return describe_option(sampler, rule)


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
        options = parse_yaml("{" + text.replace("\n", ", ") + "}")
    except SpecError as error:
        raise SpecError(
            f"further options: {error}; write them as suffix_window: 64, stop_at_eos: false"
        ) from error
    if not isinstance(options, dict) or any(
        value is None and f"{key}: null" not in text for key, value in options.items()
    ):
        raise SpecError("further options are written as NAME: VALUE, separated by commas")
    return options


def _write(options: Mapping[str, Any]) -> str:
    words = {True: "true", False: "false", None: "null"}
    return ", ".join(
        f"{key}: {words[value] if isinstance(value, bool | None) else value}"
        for key, value in options.items()
    )
