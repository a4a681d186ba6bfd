"""Specs and models from the options ``--spec``, ``--set``, ``--sampler-preset``, ``--device``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffa.cli.output import print_note
from diffa.errors import SpecError, show, suggest

if TYPE_CHECKING:
    from diffa.mapping.plan import ModelSource
    from diffa.model import Model
    from diffa.spec.spec import Spec


def default_spec() -> str:
    """Return the spec to use if none is named: DIFFA_SPEC, else nano, else the untrained tiny."""
    import diffa

    if named := os.environ.get("DIFFA_SPEC", "").strip():
        return named
    if (Path(diffa.__file__).parent / "assets" / "presets" / "nano.yaml").is_file():
        return "nano"
    print_note(
        "using the preset 'tiny': it is untrained and its answers mean nothing; "
        "for DIFFA's published weights (20 GB) add --spec diffa-1"
    )
    return "tiny"


def read_spec(name: str, overrides: Sequence[str] | None, sampler_preset: str = "") -> Spec:
    """Read a spec, select its sampler preset and apply every override.

    Raises:
        SpecError: The spec, the sampler preset or an override is wrong.
    """
    from diffa.spec.spec import Spec

    spec = Spec.read(name)
    if sampler_preset:
        presets = spec.data.get("sampler_presets") or {}
        if sampler_preset not in presets:
            hint = suggest(sampler_preset, presets)
            raise SpecError(f"{name} has no sampler preset {sampler_preset!r}{hint}")
        spec = spec.set("sampler", sampler_preset)
    return spec.change(dict(parse_override(override) for override in overrides or ()))


def parse_override(text: str, option: str = "--set") -> tuple[str, Any]:
    """Split PATH=VALUE; the value is YAML, so 16 is a number and [a, b] a list."""
    from diffa.spec.yaml import parse_yaml

    path, equals, value = text.partition("=")
    if not path.strip() or not equals:
        raise SpecError(
            f"{option} takes PATH=VALUE, such as sampler.block_length=16, got {show(text)}"
        )
    try:
        return path.strip(), parse_yaml(value)
    except SpecError as error:
        raise SpecError(
            f"{option} {show(text)[1:-1]}: {error}; text with ': ' or '#' needs quotes"
        ) from error


def load_model(
    name: str,
    overrides: Sequence[str] | None,
    sampler_preset: str,
    device: str,
    dtype: str | None = None,
) -> tuple[Model, str]:
    """Build a spec's model or load a saved one; return it with the name of its spec."""
    name = name or default_spec()
    spec = read_spec(name, overrides, sampler_preset)  # before torch: errors show at once
    return _load(spec, name, bool(overrides or sampler_preset), resolve_device(device), dtype), name


def _load(spec: Spec, name: str, changed: bool, device: str, dtype: str | None) -> Model:
    import diffa

    if not _is_saved(name):
        return diffa.build(spec, device=device, dtype=dtype)
    model = diffa.load(name, device=device, dtype=dtype)
    if not changed:
        return model
    data = spec.resolve().data
    _check_only_sampler_differs(model.spec.data, data)
    return diffa.swap(model, sampler=data["sampler"])


def model_source(
    name: str,
    overrides: Sequence[str] | None,
    sampler_preset: str,
    device: str,
    dtype: str | None,
) -> ModelSource:
    """Describe a model so that other processes can load it.

    Raises:
        SpecError: The spec is wrong, or overrides more of a saved model than its sampler.
    """
    from diffa.mapping.plan import ModelSource

    data = read_spec(name, overrides, sampler_preset).resolve().data
    if not _is_saved(name):
        return ModelSource(data, None, device, dtype)
    _check_only_sampler_differs(read_spec(name, None).resolve().data, data)
    return ModelSource(data, str(Path(name).resolve()), device, dtype)


def resolve_device(name: str) -> str:
    """Return the device that ``--device`` names; raise SpecError if it cannot be used."""
    import torch

    from diffa.assembly import parse_device

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(parse_device(name))
    except SpecError as error:
        raise SpecError(f"--device {error}") from error


def _is_saved(name: str) -> bool:
    from diffa.spec.spec import is_preset

    return not is_preset(name) and os.path.isfile(Path(name) / "model.safetensors")


def _check_only_sampler_differs(saved: dict[str, Any], new: dict[str, Any]) -> None:
    """A saved model's weights fit its other parts, so only the sampler can be exchanged."""
    names = [
        key for key in new if key not in ("sampler", "sampler_presets") and new[key] != saved[key]
    ]
    if names:
        raise SpecError(f"only the sampler of a saved model can be set, not {', '.join(names)}")
