"""Large audio-language models whose language model is a masked-diffusion one, from parts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffa import errors
from diffa.build import build, swap
from diffa.save import load, save

if TYPE_CHECKING:
    from diffa.canvas.prefix_cache import PrefixCache
    from diffa.model import Model
    from diffa.spec.registry import available
    from diffa.spec.spec import Spec
    from diffa.types import Answer, Generation

__version__ = "0.1.0"

_LAZY = {  # public names whose modules import torch, or are not needed by most programs
    "Answer": "diffa.types",
    "Generation": "diffa.types",
    "Model": "diffa.model",
    "PrefixCache": "diffa.canvas.prefix_cache",
    "Spec": "diffa.spec.spec",
    "available": "diffa.spec.registry",
}

__all__ = [
    "Answer",
    "Generation",
    "Model",
    "PrefixCache",
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
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
