"""Validate a written spec against the parts it names, and fill in every default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffa.errors import DiffaError, PluginError, SpecError, show, suggest
from diffa.spec import registry
from diffa.spec.schema import Schema, coerce, read_schema

FORMAT = 1
SPEC_KEYS = (
    "format",
    "encoder",
    "adapters",
    "backbone",
    "objective",
    "sampler",
    "train",
    "prompt",
    "sampler_presets",
)
TRANSCRIBE = "Please transcribe the audio to text."
"""DIFFA's question for a transcript."""
PROMPT_DEFAULTS: dict[str, str | int] = {
    "system": "You are a helpful voice assistant.",
    "user": "This is the audio: <audio>. {question}",
    "max_tokens": 128,  # default length of an answer
}
_DEFAULTS = {
    "masked": {"sampler": "blockwise", "objective": "masked"},
    "causal": {"sampler": "greedy", "objective": "autoregressive"},
}


def validate_spec(written: Mapping[Any, Any], source: str = "") -> dict[str, Any]:
    """Return the spec with every default filled in; raises SpecError with all of its faults."""
    validator = _Validator(written)
    spec = validator.run()
    if validator.faults:
        spec_faults = [
            line for line, error in validator.faults if not isinstance(error, PluginError)
        ]
        kind = SpecError if spec_faults else PluginError
        if kind is PluginError and len(validator.faults) == 1:
            line, error = validator.faults[0]
            raise PluginError(line) from error
        lines = "\n".join(f"  {line}" for line, _ in validator.faults)
        raise kind(f"invalid spec{source and ' ' + source}:\n{lines}")
    return spec


def decoding_mismatch(path: str, name: str, decoding: str, backbone: str, rule: str) -> str:
    """Return the error for a sampler or objective that cannot drive a backbone."""
    remedy = _DEFAULTS.get(rule, {}).get(path.partition(".")[0])
    hint = f"; use {remedy!r}" if remedy else ""
    return f"{path}: {show(name)} is for {decoding} backbones, but {backbone!r} is {rule}{hint}"


class _Validator:
    """One pass over a written spec; a fault is recorded and the pass goes on."""

    def __init__(self, written: Mapping[Any, Any]) -> None:
        self.written = written
        self.faults: list[tuple[str, Exception | None]] = []
        self.classes: dict[str, type[Any]] = {}

    def run(self) -> dict[str, Any]:
        number = self.written.get("format", FORMAT)
        if type(number) is not int or number != FORMAT:
            self.fault(
                "format",
                f"{show(number)} is not known; this diffa reads format {FORMAT}"
                + ("; upgrade diffa" if isinstance(number, int) and number > FORMAT else ""),
            )
            return {}  # the other keys may mean something else in another format
        for key in self.written:
            if key not in SPEC_KEYS:
                self.fault(str(key), f"unknown key{suggest(show(key), SPEC_KEYS)}")
        done: dict[str, Any] = {"format": FORMAT}
        # In this order: defaults of objective and sampler depend on the backbone's decoding.
        # Without encoder and adapters: a text model.
        if not self.written.get("encoder") and not self.written.get("adapters"):
            done["encoder"], done["adapters"] = None, {}
        else:
            done["encoder"] = self.part("encoder", "encoder", self.required("encoder"))
            done["adapters"] = self.named("adapters", "adapter", self.required("adapters"))
        done["backbone"] = self.part("backbone", "backbone", self.required("backbone"))
        done["objective"] = self.part("objective", "objective", self.or_default("objective"))
        done["sampler_presets"] = self.named(
            "sampler_presets", "sampler", self.written.get("sampler_presets") or {}
        )
        # A sampler may be the name of a preset, so presets come first.
        done["sampler"] = self.sampler(done["sampler_presets"])
        done["train"] = self.train()
        done["prompt"] = self.prompt()
        self.decodings(done)
        return {key: done[key] for key in SPEC_KEYS}

    def fault(self, path: str, text: str, error: Exception | None = None) -> None:
        self.faults.append((f"{path}: {text}" if path else text, error))

    def required(self, key: str) -> Any:
        value = self.written.get(key)
        if value is None:
            kind = key.removesuffix("s")
            self.fault(key, f"is missing; known: {', '.join(registry.available(kind))}")
        return value

    def or_default(self, key: str) -> Any:
        """Return the written sampler or objective, or the default for the backbone's decoding."""
        if self.written.get(key) is not None:
            return self.written[key]
        # A backbone that could not be loaded has a fault of its own: assume the common case.
        decoding = getattr(self.classes.get("backbone"), "decoding", "masked")
        return _DEFAULTS.get(decoding, _DEFAULTS["masked"])[key]

    def part(self, path: str, kind: str, value: Any) -> dict[str, Any]:
        """Return one part: its name and every option in the order of its constructor."""
        if value is None:
            return {}
        if isinstance(value, str | type):
            value = {"name": value}
        if not isinstance(value, Mapping):
            self.fault(path, f"expected a name or a mapping with a name, got {show(value)}")
            return {}
        name = value.get("name")
        if not isinstance(name, str | type):
            wrong = "needs a name" if name is None else f"expected a name, got {show(name)}"
            self.fault(path, f"{wrong}; known: {', '.join(registry.available(kind))}")
            return {}
        schema = self.load(path, kind, name)
        return {} if schema is None else self.options(path, name, value, schema)

    def load(self, path: str, kind: str, name: str | type) -> Schema | None:
        try:
            if isinstance(name, type):
                registry.validate_part(kind, name)
            cls = registry.load_part(kind, name) if isinstance(name, str) else name
            self.classes[path] = cls
            return read_schema(cls)
        except DiffaError as error:
            self.fault(path, str(error), error)
            return None

    def options(
        self, path: str, name: str | type, value: Mapping[Any, Any], known: Schema
    ) -> dict[str, Any]:
        done = {"name": name, **{key: option.default for key, option in known.options.items()}}
        for key, raw in value.items():
            if key == "name":
                continue
            if key in known.options:
                place = f"{path}.{key}"
                done[key] = coerce(raw, known.options[key].hint, place, self.fault)
            elif key in known.wires:
                self.fault(f"{path}.{key}", "is set automatically; remove it from the spec")
            else:
                self.fault(f"{path}.{key}", f"unknown option{suggest(show(key), known.options)}")
        return done

    def named(self, key: str, kind: str, value: Any) -> dict[str, Any]:
        """Return an ordered mapping of names to parts: the adapters, or the sampler presets."""
        if not isinstance(value, Mapping):
            if value is not None:
                self.fault(key, f"expected a mapping of names to {kind}s, got {show(value)}")
            return {}
        if key == "adapters" and not value:
            self.fault(key, f"at least one is needed; known: {', '.join(registry.available(kind))}")
        done = {}
        for name, part in value.items():
            path = f"{key}.{name}"
            if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
                self.fault(path, "a name is made of letters, digits, '-' and '_'")
            elif key == "adapters" and _is_reserved(name):
                self.fault(path, "the name is taken by torch's ModuleDict; choose another")
            elif key == "sampler_presets" and name in registry.available("sampler"):
                self.fault(path, "is the name of a sampler; give the sampler preset another")
            elif part is None:
                self.fault(path, f"needs a name; known: {', '.join(registry.available(kind))}")
            done[name] = self.part(path, kind, part)
        return done

    def sampler(self, sampler_presets: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sampler, which may be written as the name of a sampler preset."""
        value = self.or_default("sampler")
        if isinstance(value, str) and value in sampler_presets:
            # The preset's class stands for the sampler where decodings are compared.
            if f"sampler_presets.{value}" in self.classes:
                self.classes["sampler"] = self.classes[f"sampler_presets.{value}"]
            return dict(sampler_presets[value])
        if isinstance(value, str) and sampler_presets and ":" not in value:
            known = registry.available("sampler")
            if not any(name.rpartition(":")[2] == value for name in known):
                names = [*sampler_presets, *known]
                self.fault(
                    "sampler", f"no sampler preset or sampler {show(value)}{suggest(value, names)}"
                )
                return {}
        return self.part("sampler", "sampler", value)

    def train(self) -> list[str]:
        """Return the parts to train; by default the adapters."""
        value = self.written.get("train")
        if value is None:
            value = ["adapters"] if self.written.get("adapters") else []
        if not isinstance(value, list):
            self.fault("train", f"expected a list such as [adapters], got {show(value)}")
            return []
        # Names as written: a faulty adapter is reported once, not again as an unknown part.
        adapters = self.written.get("adapters")
        keys = adapters if isinstance(adapters, Mapping) else {}
        known = ["adapters", "backbone", "encoder", *(f"adapters.{key}" for key in keys)]
        backbone = self.written.get("backbone")
        if isinstance(backbone, Mapping) and backbone.get("lora"):
            known.append("backbone.lora")
        for index, entry in enumerate(value):
            if entry not in known:
                self.fault(
                    f"train.{index}", f"unknown part {show(entry)}{suggest(show(entry), known)}"
                )
            elif entry in value[:index]:
                self.fault(f"train.{index}", f"{show(entry)} is given twice")
        return value

    def prompt(self) -> dict[str, Any]:
        """Return the prompt's turns; the user's holds the places of audio and question."""
        value = self.written.get("prompt") or {}
        if not isinstance(value, Mapping):
            self.fault(
                "prompt", f"expected a mapping with {', '.join(PROMPT_DEFAULTS)}, got {show(value)}"
            )
            return {}
        done: dict[str, Any] = dict(PROMPT_DEFAULTS)
        for key, text in value.items():
            if key in PROMPT_DEFAULTS:
                done[key] = coerce(text, type(PROMPT_DEFAULTS[key]), f"prompt.{key}", self.fault)
            else:
                self.fault(f"prompt.{key}", f"unknown key{suggest(show(key), PROMPT_DEFAULTS)}")
        length = done["max_tokens"]
        if isinstance(length, int) and length < 1:
            self.fault("prompt.max_tokens", f"must be at least 1, got {length}")
        for place in ("<audio>", "{question}"):
            if isinstance(done["user"], str) and done["user"].count(place) != 1:
                self.fault(
                    "prompt.user", f"must hold {place} exactly once, got {show(done['user'])}"
                )
        return done

    def decodings(self, done: Mapping[str, Any]) -> None:
        """Report a sampler or objective that cannot drive this backbone."""
        rule = getattr(self.classes.get("backbone"), "decoding", None)
        for path in ("objective", "sampler"):
            own = getattr(self.classes.get(path), "decoding", None)
            if isinstance(own, str) and isinstance(rule, str) and own != rule:
                name, backbone = done[path]["name"], done["backbone"]["name"]
                names = [n if isinstance(n, str) else n.__name__ for n in (name, backbone)]
                self.fault("", decoding_mismatch(path, names[0], own, names[1], rule))


def _is_reserved(name: str) -> bool:
    """Return whether torch's ModuleDict, which holds the adapters, has such an attribute."""
    from torch.nn import ModuleDict

    return hasattr(ModuleDict(), name)
