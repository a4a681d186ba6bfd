"""A spec names the parts of a model: read, validate, complete, change and digest it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from diffa.errors import PluginError, SpecError, show, suggest
from diffa.spec import registry
from diffa.spec.schema import Schema, read_schema, to_plain
from diffa.spec.validation import PROMPT_DEFAULTS, SPEC_KEYS, decoding_mismatch, validate_spec
from diffa.spec.yaml import parse_json, parse_yaml, read_mapping, write_yaml

log = logging.getLogger(__name__)

__all__ = ["PartSpec", "Schema", "Spec", "decoding_mismatch", "presets"]

_PRESETS = Path(__file__).parent.parent / "assets" / "presets"
_PARTS = ("encoder", "backbone", "objective", "sampler")


class PartSpec(NamedTuple):
    """A part named by a spec: its dotted path, kind, name or class, and all its options."""

    path: str
    kind: str
    name: str | type[Any]
    options: dict[str, Any]

    def load(self) -> type[Any]:
        """Return the part's class; raises PluginError where it cannot be imported."""
        return registry.load_part(self.kind, self.name) if isinstance(self.name, str) else self.name


class Spec:
    """A validated spec; immutable: ``set`` and ``resolve`` return new ones.

    Args:
        data: The spec as a mapping.
        source: Name of its file, for errors.

    Raises:
        SpecError: The spec has faults; the message lists all of them.
    """

    def __init__(self, data: Mapping[Any, Any], source: str = "") -> None:
        self._written: dict[str, Any] = to_plain(data)
        self._complete = validate_spec(self._written, source)

    @classmethod
    def read(cls, spec: Spec | Mapping[Any, Any] | str | os.PathLike[str]) -> Spec:
        """Return the spec of a mapping, a YAML or JSON file, a saved model, or a preset."""
        if isinstance(spec, Spec):
            return spec
        if isinstance(spec, Mapping):
            return cls(spec)
        if not isinstance(spec, str | os.PathLike):
            kind = type(spec).__name__
            raise SpecError(f"a spec is a mapping, a path or the name of a preset, not a {kind}")
        path = _locate(spec)
        return cls(read_mapping(path), path.name)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Return the spec of a text that ``to_json`` or ``to_yaml`` wrote."""
        value = parse_json(text) if text.lstrip().startswith("{") else parse_yaml(text)
        if not isinstance(value, dict):
            raise SpecError(f"a spec is a mapping, not {value!r}")
        return cls(value)

    @property
    def data(self) -> dict[str, Any]:
        """A copy of the spec as it was written, in plain types."""
        return dict(to_plain(self._written))

    def resolve(self) -> Spec:
        """Return the spec with every default filled in and its sampler preset written out."""
        return Spec(self._complete)

    def set(self, path: str, value: Any) -> Spec:
        """Return a spec with one value changed; raises SpecError for an unknown path."""
        return self.change({path: value})

    def change(self, values: Mapping[str, Any]) -> Spec:
        """Return a spec with several values changed, validated once they are all in place."""
        data = self.data
        for path, value in values.items():
            self._put(data, path, to_plain(value))
        return Spec(data)

    def parts(self) -> dict[str, PartSpec]:
        """Return every part by dotted path, in build order, without sampler presets."""
        spec = to_plain(self._complete)
        entries = [(kind, kind, spec[kind]) for kind in ("encoder", "backbone")]
        entries += [(f"adapters.{k}", "adapter", part) for k, part in spec["adapters"].items()]
        entries += [(kind, kind, spec[kind]) for kind in ("objective", "sampler")]
        # A text model has no encoder.
        return {p: PartSpec(p, kind, part.pop("name"), part) for p, kind, part in entries if part}

    def digest(self) -> str:
        """Return a digest of the model that the spec builds, 12 hexadecimal digits.

        It is equal for equal models, however they are written. The order of adapters counts; the
        order of options and sampler presets that are not chosen do not.
        """
        canonical = {
            key: value for key, value in self._complete.items() if key != "sampler_presets"
        }
        canonical["adapters"] = [[key, part] for key, part in canonical["adapters"].items()]
        text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), default=_class_name)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """Return the spec as YAML; raises SpecError where it holds a class instead of a name."""
        self._refuse_classes()
        return write_yaml(self._written)

    def to_json(self) -> str:
        """Return the spec as JSON; raises SpecError where it holds a class instead of a name."""
        self._refuse_classes()
        return json.dumps(self._written, indent=2, ensure_ascii=False, allow_nan=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        same_presets = self._complete["sampler_presets"] == other._complete["sampler_presets"]
        return same_presets and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        """Show every part with the options that differ from its defaults."""
        texts = []
        for path, part in self.parts().items():
            options = ", ".join(f"{k}={show(v)}" for k, v in _changed_options(part).items())
            texts.append(f"{path}={_class_name(part.name)}" + (f"({options})" if options else ""))
        return f"Spec({', '.join(texts)})"

    def _refuse_classes(self) -> None:
        for path, part in self.parts().items():
            if not isinstance(part.name, str):
                raise SpecError(
                    f"{path}: the class {_class_name(part.name)} stands for a name, so this spec "
                    "cannot be written down; give the class an entry point and use its name"
                )

    def _put(self, data: dict[str, Any], path: str, value: Any) -> None:
        """Change one place of the written data, which is validated afterwards."""
        top, *rest = path.split(".")
        if top not in SPEC_KEYS:
            raise SpecError(f"{path}: there is no {top!r} in a spec{suggest(top, SPEC_KEYS)}")
        if not rest:
            data[top] = value
        elif top in _PARTS:
            data[top] = self._part_mapping(data, top)
            _parent_of(data[top], self._complete[top], rest, path)[rest[-1]] = value
        elif top in ("adapters", "sampler_presets"):
            self._put_named(data, top, rest, path, value)
        elif top == "prompt" and len(rest) == 1 and rest[0] in PROMPT_DEFAULTS:
            data["prompt"] = {**(data.get("prompt") or {}), rest[0]: value}
        elif top == "prompt":
            raise SpecError(f"{path}: unknown path{suggest(rest[0], PROMPT_DEFAULTS)}")
        else:
            raise SpecError(f"{path}: {top} is set as a whole: set {top!r}")

    def _put_named(
        self, data: dict[str, Any], top: str, rest: list[str], path: str, value: Any
    ) -> None:
        parts = data.get(top) or {}
        if rest[0] not in parts:
            raise SpecError(f"{path}: {top} has no {rest[0]!r}{suggest(rest[0], parts)}")
        if len(rest) == 1:
            parts[rest[0]] = value
            return
        parts[rest[0]] = _to_mapping(parts[rest[0]])
        known = self._complete[top].get(rest[0], {})
        _parent_of(parts[rest[0]], known, rest[1:], path)[rest[-1]] = value

    def _part_mapping(self, data: dict[str, Any], top: str) -> dict[str, Any]:
        """Return the mapping of a part that may be written as a name."""
        written = data.get(top)
        if written is None:
            written = self._complete[top]["name"]
        sampler_presets = data.get("sampler_presets") or {}
        if top == "sampler" and isinstance(written, str) and written in sampler_presets:
            written = sampler_presets[written]
        return _to_mapping(written)


def presets() -> tuple[str, ...]:
    """Return the names of the specs that diffa ships."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.yaml")))


def is_preset(spec: object) -> bool:
    """Return whether a spec is a preset's name, which wins over a folder of that name."""
    return isinstance(spec, str) and spec in presets()


def _locate(spec: str | os.PathLike[str]) -> Path:
    """Return the file of a path or of a preset's name."""
    path = Path(spec)
    if is_preset(spec):
        if os.path.isfile(path / "spec.json"):
            log.warning("%s is the preset; the model saved in this folder is ./%s", spec, spec)
        return _PRESETS / f"{spec}.yaml"
    if os.path.isfile(path / "spec.json"):  # False for names that the system refuses
        return path / "spec.json"
    if os.path.isdir(path):
        inner = path / "model"
        hint = f"; say {inner}" if (inner / "spec.json").is_file() else ""
        raise SpecError(f"the folder {path} holds no spec.json{hint}")
    named = isinstance(spec, str) and path.name == spec and spec.strip()
    if not named or path.suffix in (".yaml", ".yml", ".json"):
        return path
    near = suggest(str(spec), presets())
    raise SpecError(f"there is no preset {spec!r}{near} (files end in .yaml, .yml or .json)")


def _to_mapping(part: Any) -> dict[str, Any]:
    return dict(deepcopy(part)) if isinstance(part, Mapping) else {"name": part}


def _parent_of(
    node: dict[str, Any], known: Mapping[str, Any], steps: list[str], path: str
) -> dict[str, Any]:
    """Return the mapping that holds a path's last step; makes the mappings on the way."""
    for step in steps[:-1]:
        inner = node.get(step, known.get(step))
        if inner is not None and not isinstance(inner, Mapping):
            raise SpecError(f"{path}: {step!r} holds {inner!r}, not a mapping")
        node[step] = dict(inner or {})
        node, known = node[step], {}
    return node


def _changed_options(part: PartSpec) -> dict[str, Any]:
    """Return the options of a part that are not its defaults; all of a part that is not here."""
    try:
        cls = registry.load_part(part.kind, part.name) if isinstance(part.name, str) else part.name
        known = read_schema(cls).options
    except PluginError:
        known = {}
    defaults = {name: option.default for name, option in known.items()}
    return {k: v for k, v in part.options.items() if k not in defaults or defaults[k] != v}


def _class_name(name: Any) -> str:
    return name if isinstance(name, str) else f"{name.__module__}:{name.__qualname__}"
