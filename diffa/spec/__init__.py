"""Specs: name the parts of a model, validate them against installed plugins, fill in defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffa.spec.spec import PartSpec, Spec, presets

__all__ = ["PartSpec", "Spec", "presets"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import diffa`` needs no YAML."""
    if name in __all__:
        from diffa.spec import spec

        return getattr(spec, name)
    raise AttributeError(f"module 'diffa.spec' has no attribute {name!r}")
