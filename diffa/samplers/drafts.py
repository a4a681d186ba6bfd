"""Drafts of a block's future, read beside the block in one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffa.samplers.acceptance import Rule
from diffa.samplers.blocks import Place
from diffa.samplers.predictions import Predictions, clean
from diffa.types import Denoise

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Draft(NamedTuple):
    """Guesses at the block's future, (B, D, W) tokens; ``there`` (B,) says which rows have any."""

    tokens: Tensor
    there: Tensor


def look(
    canvas: Canvas,
    denoise: Denoise,
    place: Place,
    own: Tensor,
    there: Tensor,
    tokens: Tensor,
    drafted: Tensor,
    shadows: Tensor,
) -> Tensor:
    """Logits (B, 1 + D, W, V) of the masks of the block and of its drafts.

    Rows that have just entered their block recompute everything, and have no drafts yet.

    Args:
        canvas: with the block in its slots ``own`` (B, W), as far as they are ``there``.
        denoise: the call that drives the backbone.
        place: where the rows work.
        own: see ``canvas``.
        there: see ``canvas``.
        tokens: the block as it stands, then its drafts, (B, 1 + D, W).
        drafted: which rows have drafts, (B,).
        shadows: scratch slots for the drafts, (D * W,), each draft in a branch of its own.
    """
    count, depth, width = tokens.shape
    beside = (there & drafted[:, None]).repeat(1, depth - 1)
    if depth > 1:
        spots = canvas.positions[:count].gather(1, own).repeat(1, depth - 1)
        canvas.fill_scratch(shadows, beside, tokens[:, 1:].flatten(1), spots)
    block, extra = torch.where(there, own, -1), torch.where(beside, shadows, -1)
    alone = torch.arange(canvas.start + canvas.length, device=own.device)
    everything = canvas.valid[:count, : len(alone)] & place.fresh[:, None]
    if bool(place.fresh.any()):
        block = torch.where(place.fresh[:, None], -1, block)
        extra = torch.cat([torch.where(everything, alone, -1), extra], dim=1)
    recompute = torch.cat([block, extra], dim=1)
    # A draft reads its own version of the block, not the block.
    attn_mask = torch.ones(*recompute.shape, canvas.size, dtype=torch.bool, device=own.device)
    hidden = torch.zeros(count, canvas.size, dtype=torch.bool, device=own.device)
    hidden = hidden.scatter(1, own, there)
    attn_mask &= ~((recompute >= len(alone))[:, :, None] & hidden[:, None])
    rows = torch.cat([torch.where(there, own, -1), torch.where(beside, shadows, -1)], dim=1)
    rows = torch.where(tokens.flatten(1).eq(canvas.vocab.mask or 0), rows, -1)
    logits = denoise(recompute, rows, attn_mask=attn_mask)
    cleaned = clean(logits, canvas.vocab.mask)
    return cleaned.view(count, depth, width, -1)


def extend(
    rule: Rule,
    place: Place,
    depth: int,
    now: Tensor,
    there: Tensor,
    chosen: Tensor,
    score: Tensor,
    *,
    length: int,
    mask: int | None,
) -> Draft:
    """Extend the block (B, W) ``depth`` steps by the tokens and scores of the last logits."""
    drafts, masked = [], (now == mask) & there
    for ahead in range(depth):
        here = place._replace(rows=torch.where(masked, 0, -1), since=place.since + ahead)
        predictions = Predictions(chosen, score, score, score, score)
        take = rule.take(predictions, here, length, None) & masked
        now, masked = torch.where(take, chosen, now), masked & ~take
        drafts.append(now)
    if not drafts:
        return Draft(now[:, None][:, :0], torch.zeros_like(place.alive))
    return Draft(torch.stack(drafts, dim=1), place.alive)
