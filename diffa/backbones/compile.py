"""Compile the parts of a Transformer block: fewer kernels and launches in cached decoding."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffa.backbones.transformer import BlockParts

_LOG = logging.getLogger(__name__)


def compile_parts(parts: BlockParts, device_type: str) -> BlockParts:
    """Return the parts compiled for a device type, once for all layers.

    Shapes are static: this is for the windows of a cached canvas, which have one width in every
    step. Beyond torch's limit of recompilations, other widths run uncompiled. Attention reads the
    KV cache and is not a part.

    The parts are returned as they are while gradients are enabled, and where torch cannot compile
    (no C++ compiler, no Triton); the latter is logged once.
    """
    if torch.is_grad_enabled() or _cannot_compile(device_type):
        return parts
    return _compiled(parts)


@lru_cache(maxsize=4)
def _compiled(parts: BlockParts) -> BlockParts:
    first, second, third = (torch.compile(part, dynamic=False) for part in parts)
    return first, second, third


@lru_cache(maxsize=8)
def _cannot_compile(device_type: str) -> bool:
    """Return whether a trivial compilation fails; log the reason."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device_type))
    except Exception as error:  # torch raises many types for missing compilers
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        _LOG.warning(
            "backbone.compile: nothing is compiled for %s: %s: %s",
            device_type,
            type(error).__name__,
            reason,
        )
        return True
    return False
