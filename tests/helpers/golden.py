"""Specs of the golden folders: small models in the published layouts."""

from __future__ import annotations

from typing import Any

from helpers import GOLDEN


def golden_spec(name: str, **parts: Any) -> dict[str, Any]:
    """The spec of a golden folder in the published layouts."""
    folder = GOLDEN / name
    backbone: dict[str, Any] = {"name": "llada", "checkpoint": str(folder / "llada")}
    if name == "diffa2-tiny":
        backbone["lora"] = {"checkpoint": str(folder / "diffa"), "merge": True}
    return {
        "encoder": {"name": "whisper", "checkpoint": str(folder / "whisper")},
        "adapters": {
            "acoustic": {"name": "qformer", "checkpoint": str(folder / "diffa")},
            "semantic": {"name": "conv", "checkpoint": str(folder / "diffa")},
        },
        "backbone": backbone,
        **parts,
    }
