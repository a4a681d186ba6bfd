"""Processes that train together; weights that FSDP2 has sharded, gathered and loaded.

All processes must call ``full_tensors``, ``load_full_tensors``, ``optimizer_state``,
``load_optimizer_state``, ``barrier`` and ``broadcast_value`` together.
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
"""File names of transformers' Trainer."""


def is_main_process() -> bool:
    """Return whether this process writes files for all processes."""
    return int(os.environ.get("RANK", "0")) == 0


def local_device(device: torch.device) -> torch.device:
    """Return this process's own GPU under torchrun; otherwise the device itself."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's weights are sharded over processes (FSDP2)."""
    return any(_is_shard(p) for p in module.parameters())


def full_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return gathered tensors; shards are gathered one at a time, to main memory."""
    return {k: v.full_tensor().cpu() if _is_shard(v) else v for k, v in state.items()}


def load_full_tensors(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load gathered tensors into a module, sharded or not."""
    if not is_sharded(module):
        module.load_state_dict(state, strict=False)
        return
    set_model_state_dict(
        module, dict(state), options=StateDictOptions(full_state_dict=True, strict=False)
    )


def optimizer_state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's gathered state by the weights' names; empty on other processes."""
    return get_optimizer_state_dict(
        module, _unwrap(optimizer), options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_optimizer_state(module: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Load what ``optimizer_state`` returned from a checkpoint's file."""
    state = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(
        module, _unwrap(optimizer), state, options=StateDictOptions(full_state_dict=True)
    )


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if _is_distributed():
        torch.distributed.barrier()


def broadcast_value(value: float) -> float:
    """Return the first process's value on all processes."""
    values = [value]
    if _is_distributed():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _unwrap(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
