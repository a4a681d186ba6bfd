"""Build a model from a spec, and exchange parts of one.

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
    """Build the model that a spec names: a mapping, a path, or the name of a preset.

    Args:
        spec: what to build.
        device: where to; ``meta`` is a dry run that loads no weights and needs no network for
            the published models.
        dtype: of the backbone; bfloat16 on a GPU and float32 elsewhere where None. The encoder
            and the adapters stay in float32.

    Raises:
        SpecError: the spec has faults, or its parts do not fit each other.
        PluginError: a part cannot be imported or is not what it should be.
        CheckpointError: weights are missing or do not fit, or memory will not hold them.
    """
    import torch

    from diffa.assembly import assemble
    from diffa.spec.spec import Spec

    return assemble(Spec.read(spec).resolve(), torch.device(device), dtype)


def swap(model: Model, **parts: Any) -> Model:
    """Return a model with some parts exchanged and the rest shared.

    ``swap(model, sampler={"name": "blockwise", "threshold": 0.9})`` replaces a whole part:
    options that are left out take their defaults. ``adapters`` takes a mapping of all of them.

    Raises:
        SpecError: a part that a spec does not have, or one that does not fit the others.
    """
    from diffa.assembly import assemble
    from diffa.spec.spec import Spec

    known = ("encoder", "adapters", "backbone", "sampler", "objective")
    if wrong := [kind for kind in parts if kind not in known]:
        raise SpecError(f"unknown part {wrong[0]!r}; swap accepts {', '.join(known)}")
    data = model.spec.data
    data.update(parts)
    if data.get("train"):  # what is gone cannot learn
        data["train"] = [name for name in data["train"] if name not in _gone(model, parts)]
    replaced = set(parts)
    if "encoder" in replaced or "backbone" in replaced:
        replaced.add("adapters")  # built for the width of both
    if "backbone" in replaced:
        replaced |= {"sampler", "objective"}  # built for its vocabulary
    shared = {kind: getattr(model, kind) for kind in known if kind not in replaced}
    swapped = assemble(Spec.read(data).resolve(), model.device, model.dtype, shared=shared)
    return swapped.train(model.training)


def _gone(model: Model, parts: Mapping[str, Any]) -> set[str]:
    """Names of what could learn in a model, and is not in the parts that replace its own."""
    kept = set(parts.get("adapters", model.adapters))
    gone = {f"adapters.{key}" for key in model.adapters if key not in kept}
    backbone = parts.get("backbone", model.spec.data["backbone"])
    lora = isinstance(backbone, Mapping) and backbone.get("lora")
    return gone if lora else {*gone, "backbone.lora"}
