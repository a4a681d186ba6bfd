"""Build a model from a spec, and replace parts of a model.

The package's ``__init__`` imports this module, so torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffa.errors import SpecError

if TYPE_CHECKING:
    import torch

    from diffa.model import Model
    from diffa.spec.spec import Spec


def build(
    spec: Spec | Mapping[str, Any] | str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> Model:
    """Return the model of a spec.

    Args:
        spec: A mapping, a path, or the name of a preset.
        device: Device of the model; ``meta`` is a dry run that loads no weights and needs no
            network for the published models.
        dtype: Dtype of the backbone. Default: bfloat16 on a GPU, float32 elsewhere. The encoder
            and the adapters stay in float32.

    Raises:
        SpecError: The spec has faults, or its parts do not fit each other.
        PluginError: A part cannot be imported, or breaks the contract of its kind.
        CheckpointError: Weights are missing or do not fit, or memory is too small for them.
    """
    import torch

    from diffa.assembly import assemble
    from diffa.spec.spec import Spec

    return assemble(Spec.read(spec).resolve(), torch.device(device), dtype)


def swap(model: Model, **parts: Any) -> Model:
    """Return a model with some parts replaced and the rest shared.

    ``swap(model, sampler={"name": "blockwise", "threshold": 0.9})`` replaces a whole part:
    options that are left out take their defaults. ``adapters`` takes a mapping of all of them.

    Raises:
        SpecError: A part is unknown, or does not fit the others.
    """
    from diffa.assembly import assemble
    from diffa.spec.spec import Spec

    known = ("encoder", "adapters", "backbone", "sampler", "objective")
    if wrong := [kind for kind in parts if kind not in known]:
        raise SpecError(f"unknown part {wrong[0]!r}; swap accepts {', '.join(known)}")
    data = model.spec.data
    data.update(parts)
    if data.get("train"):
        removed = _removed(model, parts)
        data["train"] = [name for name in data["train"] if name not in removed]
    replaced = set(parts)
    if "encoder" in replaced or "backbone" in replaced:
        replaced.add("adapters")  # built for the width of both
    if "backbone" in replaced:
        replaced |= {"sampler", "objective"}  # built for its vocabulary
    shared = {kind: getattr(model, kind) for kind in known if kind not in replaced}
    swapped = assemble(Spec.read(data).resolve(), model.device, model.dtype, shared=shared)
    return swapped.train(model.training)


def _removed(model: Model, parts: Mapping[str, Any]) -> set[str]:
    """Return trainable parts of a model that are missing from the parts that replace its own."""
    remaining = set(parts.get("adapters", model.adapters))
    removed = {f"adapters.{key}" for key in model.adapters if key not in remaining}
    backbone = parts.get("backbone", model.spec.data["backbone"])
    lora = isinstance(backbone, Mapping) and backbone.get("lora")
    return removed if lora else {*removed, "backbone.lora"}
