"""Large audio-language models whose language model is a masked-diffusion one, from parts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffa import errors
    from diffa.building import build, swap
    from diffa.model import Model
    from diffa.registry import available
    from diffa.spec import Spec
    from diffa.store import load, save
    from diffa.types import Answer, Generation

__version__ = "0.1.0"

_HOMES = {
    "Answer": "diffa.types",
    "Generation": "diffa.types",
    "Model": "diffa.model",
    "Spec": "diffa.spec",
    "available": "diffa.registry",
    "build": "diffa.building",
    "load": "diffa.store",
    "save": "diffa.store",
    "swap": "diffa.building",
}

__all__ = [
    "Answer",
    "Generation",
    "Model",
    "Spec",
    "available",
    "build",
    "errors",
    "load",
    "save",
    "swap",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import diffa`` needs no torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "errors":
        return importlib.import_module("diffa.errors")
    raise AttributeError(f"module 'diffa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
