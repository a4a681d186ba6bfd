"""A spec names the parts of a model: read it, check it, complete it, change it, digest it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from diffa.errors import SpecError, suggest
from diffa.spec import registry
from diffa.spec.schema import Schema, to_plain
from diffa.spec.validation import PROMPT_DEFAULTS, SPEC_KEYS, decoding_mismatch, validate_spec
from diffa.spec.yaml import parse_json, parse_yaml, read_mapping, write_yaml

__all__ = ["PartSpec", "Schema", "Spec", "decoding_mismatch", "presets"]

_PRESETS = Path(__file__).parent.parent / "assets" / "presets"
_PARTS = ("encoder", "backbone", "objective", "sampler")


class PartSpec(NamedTuple):
    """A part that a spec names, at its dotted path, with every option filled in."""

    path: str
    kind: str
    name: str | type[Any]
    options: dict[str, Any]

    def load(self) -> type[Any]:
        """Import the part's class."""
        return registry.load_part(self.kind, self.name) if isinstance(self.name, str) else self.name


class Spec:
    """A checked spec. It never changes: ``set`` and ``resolve`` return new ones."""

    def __init__(self, data: Mapping[Any, Any], source: str = "") -> None:
        self._written: dict[str, Any] = to_plain(data)
        self._complete = validate_spec(self._written, source)

    @classmethod
    def read(cls, spec: Spec | Mapping[Any, Any] | str | os.PathLike[str]) -> Spec:
        """Read a mapping, a YAML or JSON file, a saved model's folder, or a preset by name."""
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
        """Read a spec from the text that ``to_json`` or ``to_yaml`` wrote."""
        value = parse_json(text) if text.lstrip().startswith("{") else parse_yaml(text)
        if not isinstance(value, dict):
            raise SpecError(f"a spec is a mapping, not {value!r}")
        return cls(value)

    @property
    def data(self) -> dict[str, Any]:
        """The spec as it was written, in plain types; a copy."""
        return dict(to_plain(self._written))

    def resolve(self) -> Spec:
        """Return the spec with every default filled in and a named sampler preset written out."""
        return Spec(self._complete)

    def set(self, path: str, value: Any) -> Spec:
        """Return a spec with one value changed; SpecError where the path leads nowhere."""
        return self.change({path: value})

    def change(self, values: Mapping[str, Any]) -> Spec:
        """Return a spec with several values changed, checked once they are all in place."""
        data = self.data
        for path, value in values.items():
            self._put(data, path, to_plain(value))
        return Spec(data)

    def parts(self) -> dict[str, PartSpec]:
        """Every part by dotted path, in the order they are built; sampler presets are left out."""
        done = to_plain(self._complete)
        places = [
            ("encoder", "encoder", done["encoder"]),
            ("backbone", "backbone", done["backbone"]),
        ]
        places += [(f"adapters.{k}", "adapter", part) for k, part in done["adapters"].items()]
        places += [(kind, kind, done[kind]) for kind in ("objective", "sampler")]
        return {p: PartSpec(p, kind, part.pop("name"), part) for p, kind, part in places}

    def digest(self) -> str:
        """Name what the spec builds in 12 hexadecimal digits.

        Two ways of writing one model agree. The adapters' order counts, the order of options
        does not, nor do sampler presets that are only on offer.
        """
        canonical = {
            key: value for key, value in self._complete.items() if key != "sampler_presets"
        }
        canonical["adapters"] = [[key, part] for key, part in canonical["adapters"].items()]
        text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), default=_class_name)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """Write the spec as YAML; SpecError where a class stands for a name."""
        self._refuse_classes()
        return write_yaml(self._written)

    def to_json(self) -> str:
        """Write the spec as JSON; SpecError where a class stands for a name."""
        self._refuse_classes()
        return json.dumps(self._written, indent=2, ensure_ascii=False, allow_nan=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        offers = self._complete["sampler_presets"] == other._complete["sampler_presets"]
        return offers and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        names = {path: _class_name(part.name) for path, part in self.parts().items()}
        return f"Spec({', '.join(f'{path}={name}' for path, name in names.items())})"

    def _refuse_classes(self) -> None:
        for path, part in self.parts().items():
            if not isinstance(part.name, str):
                raise SpecError(
                    f"{path}: the class {_class_name(part.name)} stands for a name, so this spec "
                    "cannot be written down; give the class an entry point and use its name"
                )

    def _put(self, data: dict[str, Any], path: str, value: Any) -> None:
        """Change one place of the written data; whether it fits is checked afterwards."""
        top, *rest = path.split(".")
        if top not in SPEC_KEYS:
            raise SpecError(f"{path}: there is no {top!r} in a spec{suggest(top, SPEC_KEYS)}")
        if not rest:
            data[top] = value
        elif top in _PARTS:
            data[top] = self._opened(data, top)
            _reach(data[top], self._complete[top], rest, path)[rest[-1]] = value
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
        parts[rest[0]] = _open(parts[rest[0]])
        known = self._complete[top].get(rest[0], {})
        _reach(parts[rest[0]], known, rest[1:], path)[rest[-1]] = value

    def _opened(self, data: dict[str, Any], top: str) -> dict[str, Any]:
        """The mapping that a part's name or a sampler preset's name stands for."""
        written = data.get(top)
        if written is None:
            written = self._complete[top]["name"]
        sampler_presets = data.get("sampler_presets") or {}
        if top == "sampler" and isinstance(written, str) and written in sampler_presets:
            written = sampler_presets[written]
        return _open(written)


def presets() -> tuple[str, ...]:
    """Names of the specs that diffa ships."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.yaml")))


def _locate(spec: str | os.PathLike[str]) -> Path:
    """Find the file that a path or the name of a preset stands for."""
    path = Path(spec)
    if (path / "spec.json").is_file():
        return path / "spec.json"
    if path.is_dir() and spec not in presets():  # a run's folder may be called as a preset is
        inner = path / "model"
        hint = f"; say {inner}" if (inner / "spec.json").is_file() else ""
        raise SpecError(f"the folder {path} holds no spec.json{hint}")
    named = isinstance(spec, str) and path.name == spec and spec.strip()
    if not named or path.suffix in (".yaml", ".yml", ".json"):
        return path
    if spec not in presets():
        near = suggest(str(spec), presets())
        raise SpecError(f"there is no preset {spec!r}{near} (files end in .yaml, .yml or .json)")
    return _PRESETS / f"{spec}.yaml"


def _open(part: Any) -> dict[str, Any]:
    return dict(deepcopy(part)) if isinstance(part, Mapping) else {"name": part}


def _reach(
    node: dict[str, Any], known: Mapping[str, Any], steps: list[str], path: str
) -> dict[str, Any]:
    """Walk to the mapping that holds a path's last step, opening mappings left out so far."""
    for step in steps[:-1]:
        inner = node.get(step, known.get(step))
        if inner is not None and not isinstance(inner, Mapping):
            raise SpecError(f"{path}: {step!r} holds {inner!r}, not a mapping")
        node[step] = dict(inner or {})
        node, known = node[step], {}
    return node


def _class_name(name: Any) -> str:
    return name if isinstance(name, str) else f"{name.__module__}:{name.__qualname__}"
