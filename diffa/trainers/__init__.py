"""Training: recipes of stages that train one spec, on transformers' Trainer and accelerate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffa.trainers.config import Recipe
    from diffa.trainers.run import Report, train

__all__ = ["Recipe", "Report", "train"]

_HOMES = {
    "Recipe": "diffa.trainers.config",
    "Report": "diffa.trainers.run",
    "train": "diffa.trainers.run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffa.trainers' has no attribute {name!r}")
