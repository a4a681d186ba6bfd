"""Blocks compiled by torch: fewer kernels and launches in the small steps of cached decoding."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffa.backbones.transformer import Parts

_LOG = logging.getLogger(__name__)


def compiled(parts: Parts, kind: str) -> Parts:
    """Return the parts of a block compiled for a kind of device, once for all layers.

    Shapes are static, so this is for windows of a cached canvas, which are as wide in every step;
    past torch's limit of recompilations other widths run plain. So do all where gradients are
    wanted, and where torch cannot compile (no C++ compiler, no Triton): a warning says so once.
    Attention reads the memory and is no part. On a CPU nano measured no gain; launches are what
    it saves, on a GPU.
    """
    if torch.is_grad_enabled() or _fault(kind):
        return parts
    return _compiled(parts)


@lru_cache(maxsize=4)
def _compiled(parts: Parts) -> Parts:
    remembering, asking, closing = (torch.compile(part, dynamic=False) for part in parts)
    return remembering, asking, closing


@lru_cache(maxsize=8)
def _fault(kind: str) -> bool:
    """Whether torch cannot compile for a kind of device; says why."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=kind))
    except Exception as error:  # whatever a missing tool chain raises
        told = (str(error).strip().splitlines() or [""])[0][:200]
        name = type(error).__name__
        _LOG.warning("backbone.compile: nothing is compiled for %s: %s: %s", kind, name, told)
        return True
    return False
