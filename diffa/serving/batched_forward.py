"""Passes of several canvases through one backbone: laid side by side, run once, taken apart.

A sampler only ever calls ``denoise``, and ``denoise`` calls the backbone once. That call is where
requests meet: each keeps a canvas, a memory and a sampler of its own, as if it were alone, and
only the backbone sees them together. So a result does not depend on who else is being answered,
beyond the rounding of a larger matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffa.backbones.ragged import is_packable, supports_packing
from diffa.canvas.kv_cache import AttentionContext, pad_queries
from diffa.types import RaggedBackbone

# Slots whose work takes as long as a pass of none: 90 for nano on one core of a Xeon (1 to 16 rows
# of 24 to 130 slots). Not measured for larger models, nor on a GPU.
_PASS = 96


class Call(NamedTuple):
    """One call of a backbone: embeddings (B, K, W) at positions (B, K) under a context."""

    embeds: Tensor
    positions: Tensor
    context: AttentionContext

    @property
    def size(self) -> int:
        """Slots of the canvas that the call belongs to, S."""
        there = self.context.positions
        return self.embeds.shape[1] if there is None else there.shape[1]


def together(backbone: Callable[..., Tensor], calls: Sequence[Call]) -> list[Tensor]:
    """Hidden states (B, K, W) of every call, from as few passes as their shapes allow.

    Calls share a pass when both or neither recompute all slots, and padding is cheaper than one
    more pass (``groups``).
    """
    found: dict[int, Tensor] = {}
    for group in groups(calls, ragged=isinstance(backbone, RaggedBackbone) and backbone.ragged):
        if len(group) == 1:
            found[group[0]] = backbone(*calls[group[0]])
            continue
        found.update(zip(group, _shared(backbone, [calls[i] for i in group]), strict=True))
    return [found[index] for index in range(len(calls))]


def groups(calls: Sequence[Call], *, ragged: bool = False) -> list[list[int]]:
    """Indices of the calls that share a pass, longest first.

    Padding costs what slots cost, and every pass costs ``_PASS`` slots besides: the cheapest
    division of the calls, in the order of their lengths, is chosen. A ``ragged`` backbone computes
    nothing for padding, where it can: such calls share one pass.
    """
    made: list[list[int]] = []
    free = ragged and all(supports_packing(call.embeds) for call in calls)
    packed = [i for i, call in enumerate(calls) if free and is_packable(call.context)]
    if packed:
        made.append(packed)
    padded = [i for i in range(len(calls)) if i not in packed]
    for whole in (True, False):
        alike = [i for i in padded if (calls[i].context.query_slots is None) == whole]
        made += _cheapest(sorted(alike, key=lambda i: -calls[i].embeds.shape[1]), calls)
    return made


def _cheapest(order: list[int], calls: Sequence[Call]) -> list[list[int]]:
    costs, begins = [0], [0]  # of the first n calls, and where their last pass begins
    for end in range(1, len(order) + 1):
        rows, ways = 0, []
        for begin in reversed(range(end)):
            count, wide, _ = calls[order[begin]].embeds.shape  # no call of the pass is longer
            rows += count
            ways.append((costs[begin] + _PASS + rows * wide, begin))
        cost, begin = min(ways)
        costs.append(cost)
        begins.append(begin)
    found: list[list[int]] = []
    end = len(order)
    while end:
        found.insert(0, order[begins[end] : end])
        end = begins[end]
    return found


def _shared(backbone: Callable[..., Tensor], calls: Sequence[Call]) -> list[Tensor]:
    """One pass for all of them."""
    wide = max(call.embeds.shape[1] for call in calls)
    embeds = torch.cat([pad_queries(call.embeds, wide) for call in calls])
    positions = torch.cat([pad_queries(call.positions, wide) for call in calls])
    context = AttentionContext.stack(
        [call.context for call in calls], [call.positions for call in calls]
    )
    hidden = backbone(embeds, positions, context)
    parts = torch.split(hidden, [len(call.embeds) for call in calls])
    return [part[:, : call.embeds.shape[1]] for part, call in zip(parts, calls, strict=True)]
