"""Run calls of several canvases through one backbone in shared forward passes.

A sampler only ever calls ``denoise``, and ``denoise`` calls the backbone once. That call is where
requests meet: each keeps its own canvas, KV cache and sampler, and only the backbone runs them
together. So a result does not depend on the other requests, beyond the rounding of a larger matrix
product.

Shapes: B rows, K slots computed in a call, S slots of a canvas, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffa.backbones.ragged import is_packable, supports_packing
from diffa.canvas.kv_cache import AttentionContext, pad_queries
from diffa.types import Backbone, RaggedBackbone

# Slots whose work takes as long as the fixed cost of a pass: 90 for nano on one core of a Xeon (1
# to 16 rows of 24 to 130 slots). Not measured for larger models, nor on a GPU.
_PASS_COST = 96


class BackboneCall(NamedTuple):
    """One call of a backbone: embeddings (B, K, W) at positions (B, K) under a context."""

    embeds: Tensor
    positions: Tensor
    context: AttentionContext


def run_together(backbone: Backbone, calls: Sequence[BackboneCall]) -> list[Tensor]:
    """Return the hidden states (B, K, W) of every call, from as few passes as pay off."""
    results: dict[int, Tensor] = {}
    ragged = isinstance(backbone, RaggedBackbone) and backbone.ragged
    for group in plan_passes(calls, ragged=ragged):
        if len(group) == 1:
            results[group[0]] = backbone(*calls[group[0]])
            continue
        results.update(zip(group, _run_pass(backbone, [calls[i] for i in group]), strict=True))
    return [results[index] for index in range(len(calls))]


def plan_passes(calls: Sequence[BackboneCall], *, ragged: bool = False) -> list[list[int]]:
    """Return the indices of the calls that share each pass.

    Calls that compute a whole canvas and calls that compute some slots never share a pass: their
    contexts differ in kind. Within a kind, padding costs what slots cost, and each pass costs
    ``_PASS_COST`` slots besides; the cheapest partition in order of length is chosen. A ``ragged``
    backbone computes nothing for padding: such calls share one pass.
    """
    groups: list[list[int]] = []
    packs = ragged and all(supports_packing(call.embeds) for call in calls)
    packed = [i for i, call in enumerate(calls) if packs and is_packable(call.context)]
    if packed:
        groups.append(packed)
    padded = [i for i in range(len(calls)) if i not in packed]
    for whole in (True, False):
        alike = [i for i in padded if (calls[i].context.query_slots is None) == whole]
        by_length = sorted(alike, key=lambda i: -calls[i].embeds.shape[1])
        groups += _cheapest_partition(by_length, calls)
    return groups


def _cheapest_partition(order: list[int], calls: Sequence[BackboneCall]) -> list[list[int]]:
    """Split calls, longest first, into runs of least cost (dynamic programming over prefixes)."""
    costs, starts = [0], [0]  # of the first n calls, and where their last pass starts
    for end in range(1, len(order) + 1):
        rows, choices = 0, []
        for start in reversed(range(end)):
            num_rows, length, _ = calls[order[start]].embeds.shape  # the longest call of the pass
            rows += num_rows
            choices.append((costs[start] + _PASS_COST + rows * length, start))
        cost, start = min(choices)
        costs.append(cost)
        starts.append(start)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.insert(0, order[starts[end] : end])
        end = starts[end]
    return groups


def _run_pass(backbone: Backbone, calls: Sequence[BackboneCall]) -> list[Tensor]:
    """Stack the rows of all calls, padded to the longest, run them once, and split them again."""
    length = max(call.embeds.shape[1] for call in calls)
    embeds = torch.cat([pad_queries(call.embeds, length) for call in calls])
    positions = torch.cat([pad_queries(call.positions, length) for call in calls])
    context = AttentionContext.stack(
        [call.context for call in calls], [call.positions for call in calls]
    )
    hidden = backbone(embeds, positions, context)
    parts = torch.split(hidden, [len(call.embeds) for call in calls])
    return [part[:, : call.embeds.shape[1]] for part, call in zip(parts, calls, strict=True)]
