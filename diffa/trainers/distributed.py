"""Processes that train together; weights that FSDP2 has split over them, gathered and put back.

``whole``, ``put``, ``moments``, ``load_moments``, ``wait`` and ``agreed`` are called by all
processes together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
"""Names that transformers' Trainer gives its files."""


def leads() -> bool:
    """Whether this process writes for all that train together."""
    return int(os.environ.get("RANK", "0")) == 0


def own(device: torch.device) -> torch.device:
    """Return this process's own GPU where several train together: one each, as torchrun says."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def is_split(module: nn.Module) -> bool:
    """Whether a module's weights are split over processes."""
    return any(_split(p) for p in module.parameters())


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return tensors as they were before they were split; one at a time, in main memory."""
    return {k: v.full_tensor().cpu() if _split(v) else v for k, v in state.items()}


def put(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a module, split or not; names that it has not are an error."""
    if not is_split(module):
        module.load_state_dict(state, strict=False)
        return
    set_model_state_dict(
        module, dict(state), options=StateDictOptions(full_state_dict=True, strict=False)
    )


def moments(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's whole state by the weights' names; empty but on the first process."""
    return get_optimizer_state_dict(
        module, _bare(optimizer), options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_moments(module: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Give an optimiser the state that ``moments`` returned, from a checkpoint's file."""
    state = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(
        module, _bare(optimizer), state, options=StateDictOptions(full_state_dict=True)
    )


def wait() -> None:
    """Wait for all processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def agreed(value: float) -> float:
    """Return the first process's value to all of them; its own where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def _split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _bare(optimizer: Any) -> Any:
    """The optimiser inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
