"""DIFFA-2's LoRA pairs: read from its checkpoint and merged into the frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffa import checkpoint
from diffa.errors import CheckpointError, SpecError, suggest

_PREFIX = "llm_model.base_model.model.model.transformer."
_OPTIONS = ("checkpoint", "revision", "alpha", "merge")


def merge(transformer: nn.Module, lora: Mapping[str, Any]) -> None:
    """Add alpha / r * B @ A to every weight that has a pair (LoRA, arXiv 2106.09685).

    The checkpoint stores neither r nor alpha: r is read from the shapes, alpha defaults to
    DIFFA-2's 16.

    Raises:
        SpecError: an unknown or impossible option.
        CheckpointError: no pairs, half a pair, or a pair that fits no weight.
    """
    for option in lora:
        if option not in _OPTIONS:
            raise SpecError(f"lora.{option}: unknown option{suggest(option, _OPTIONS)}")
    if not lora.get("merge", True):
        raise SpecError("lora.merge: only true is possible at load")
    if "checkpoint" not in lora:
        raise SpecError("lora.checkpoint: needed, the folder or Hub id that holds the pairs")
    folder = checkpoint.find(lora["checkpoint"], lora.get("revision"))
    found = checkpoint.read_weights(folder, _PREFIX)
    if not found:
        raise CheckpointError(f"{folder} holds no LoRA pairs ({_PREFIX}*.lora_A.*)")
    own = dict(transformer.named_parameters())
    for name, (down, up) in pairs(found, str(folder)).items():
        weight = own.get(f"{name}.weight")
        if weight is None or weight.shape != (len(up), down.shape[1]):
            raise CheckpointError(f"{folder}: the LoRA pair of {name!r} fits no weight here")
        scale = float(lora.get("alpha", 16)) / len(down)
        with torch.no_grad():
            change = scale * (up.to(weight.device).float() @ down.to(weight.device).float())
            weight.copy_((weight.float() + change).to(weight.dtype))


def pairs(found: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Group keys ``NAME.lora_{A,B}.default.weight`` into NAME -> (A (r, in), B (out, r))."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        name, _, half = key.removesuffix(".default.weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise CheckpointError(f"{source}: {_PREFIX}{key} is not part of a LoRA pair")
        halves.setdefault(name, {})[half] = value
    for name, pair in halves.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise CheckpointError(f"{source}: the LoRA pair of {name!r} is not whole")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}
