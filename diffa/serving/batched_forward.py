"""Passes of several canvases through one backbone: laid side by side, run once, taken apart.

A sampler only ever calls ``denoise``, and ``denoise`` calls the backbone once. That call is where
requests meet: each keeps a canvas, a memory and a sampler of its own, as if it were alone, and
only the backbone sees them together. So a result does not depend on who else is being answered,
beyond the rounding of a larger matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.backbones.ragged import is_packable, supports_packing
from diffa.canvas.kv_cache import AttentionContext
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
    embeds = torch.cat([_repeated(call.embeds, wide) for call in calls])
    positions = torch.cat([_repeated(call.positions, wide) for call in calls])
    hidden = backbone(embeds, positions, merged(calls))
    parts = torch.split(hidden, [len(call.embeds) for call in calls])
    return [part[:, : call.embeds.shape[1]] for part, call in zip(parts, calls, strict=True)]


def merged(calls: Sequence[Call]) -> AttentionContext:
    """The context of calls laid side by side: each row sees its own canvas and padding nobody."""
    size, wide = max(call.size for call in calls), max(call.embeds.shape[1] for call in calls)
    contexts = [call.context for call in calls]
    whole = contexts[0].query_slots is None
    ragged = any(call.size < size for call in calls)
    valid = None
    if ragged or any(context.valid is not None for context in contexts):
        valid = torch.cat([_widened(_valid(call), size) for call in calls])
    branch = None
    if any(context.branch is not None for context in contexts):
        branch = torch.cat([_widened(_branch(call), size) for call in calls])
    attn_mask = None
    if any(context.attn_mask is not None for context in contexts):
        attn_mask = torch.cat([_repeated(_widened(_attn_mask(call), size), wide) for call in calls])
    asked = None
    given = [context.output_slots for context in contexts if context.output_slots is not None]
    if len(given) == len(calls):
        most = max(rows.shape[1] for rows in given)
        asked = torch.cat([_repeated(rows, most) for rows in given])
    memory: Any = None
    if any(context.kv_cache is not None for context in contexts):
        memory = _Memories(calls, size)
    return AttentionContext(
        valid=valid,
        positions=torch.cat([_widened(_positions(call), size) for call in calls]),
        branch=branch,
        query_slots=None if whole else torch.cat([_repeated(_slots(c), wide) for c in contexts]),
        attn_mask=attn_mask,
        kv_cache=memory,
        write=True,
        output_slots=asked,
    )


class _Memories:
    """The memories of several canvases where a backbone expects one."""

    def __init__(self, calls: Sequence[Call], size: int) -> None:
        self._calls, self._size = calls, size

    def update(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        slots: Tensor | None,
        rows: Tensor | None,
        *,
        write: bool,
    ) -> tuple[Tensor, Tensor]:
        """Let every canvas remember its own part, and return the keys and values of all."""
        found_keys = keys.new_zeros(len(keys), self._size, *keys.shape[2:])
        found_values = values.new_zeros(len(values), self._size, *values.shape[2:])
        first = 0
        for call in self._calls:
            here, count = slice(first, first + len(call.embeds)), call.embeds.shape[1]
            mine = keys[here, :count], values[here, :count]
            if call.context.write and call.context.query_slots is None:
                mine = mine[0].clone(), mine[1].clone()  # kept: the pass's tensor must not be
            all_keys, all_values = call.context.update_cache(layer, *mine)
            found_keys[here, : all_keys.shape[1]] = all_keys
            found_values[here, : all_values.shape[1]] = all_values
            first = here.stop
        return found_keys, found_values


def _valid(call: Call) -> Tensor:
    if call.context.valid is not None:
        return call.context.valid
    shape = (len(call.embeds), call.size)
    return torch.ones(shape, dtype=torch.bool, device=call.embeds.device)


def _branch(call: Call) -> Tensor:
    if call.context.branch is not None:
        return call.context.branch
    return torch.zeros_like(_positions(call))


def _attn_mask(call: Call) -> Tensor:
    if call.context.attn_mask is not None:
        return call.context.attn_mask
    shape = (*call.positions.shape, call.size)
    return torch.ones(shape, dtype=torch.bool, device=call.embeds.device)


def _positions(call: Call) -> Tensor:
    return call.positions if call.context.positions is None else call.context.positions


def _slots(context: AttentionContext) -> Tensor:
    assert context.query_slots is not None  # a pass is of whole canvases or of parts, never of both
    return context.query_slots


def _widened(values: Tensor, size: int) -> Tensor:
    """Pad the last axis with zeros up to ``size``."""
    return F.pad(values, (0, size - values.shape[-1]))


def _repeated(values: Tensor, wide: int) -> Tensor:
    """Pad axis 1 up to ``wide`` with its first entry: computed twice alike, harmlessly."""
    more = wide - values.shape[1]
    if not more:
        return values
    return torch.cat([values, values[:, :1].expand(-1, more, *values.shape[2:])], dim=1)
