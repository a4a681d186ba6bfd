"""Drafts of a block's next steps, verified beside the block in one forward pass (FreeDave)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffa.samplers.acceptance import AcceptanceRule
from diffa.samplers.blocks import BlockState
from diffa.samplers.predictions import Predictions, exclude_mask
from diffa.types import Denoise

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Drafts(NamedTuple):
    """Predicted versions of the block after 1 .. D more steps.

    Attributes:
        tokens: (B, D, W).
        exists: (B,) bool, rows that have drafts.
    """

    tokens: Tensor
    exists: Tensor


class BlockView(NamedTuple):
    """The current block of every row as W slots: (B, W) each.

    Attributes:
        slots: Slots of the canvas.
        exists: bool, False past the end of the answer and in rows that are done.
    """

    slots: Tensor
    exists: Tensor


def read_versions(
    canvas: Canvas,
    denoise: Denoise,
    state: BlockState,
    view: BlockView,
    versions: Tensor,
    has_drafts: Tensor,
    scratch: Tensor,
) -> Tensor:
    """Run one pass over the block and its drafts; return their logits (B, 1 + D, W, V).

    ::

        prompt | block | later blocks | draft 1 | draft 2 ...   (scratch slots, a branch each)

    A draft attends to everything but the block, whose place it takes. Only masks have logits.
    Rows that have just entered their block recompute all slots, and have no drafts yet.

    Args:
        canvas: Holds the block in ``view.slots``.
        denoise: Runs one forward pass of the backbone.
        state: The block of each row.
        view: Its slots.
        versions: Tokens of the block, then of its drafts, (B, 1 + D, W).
        has_drafts: Rows that have drafts, (B,) bool.
        scratch: Scratch slots of the drafts, (D * W,).
    """
    rows, depth, width = versions.shape
    drafted = (view.exists & has_drafts[:, None]).repeat(1, depth - 1)
    if depth > 1:
        positions = canvas.positions[:rows].gather(1, view.slots).repeat(1, depth - 1)
        canvas.fill_scratch(scratch, drafted, versions[:, 1:].flatten(1), positions)
    block_slots = torch.where(view.exists, view.slots, -1)
    draft_slots = torch.where(drafted, scratch, -1)
    main_slots = torch.arange(canvas.start + canvas.length, device=versions.device)
    recompute = [block_slots, draft_slots]
    if bool(state.entered.any()):
        everything = canvas.valid[:rows, : len(main_slots)] & state.entered[:, None]
        without_entered = torch.where(state.entered[:, None], -1, block_slots)
        recompute = [without_entered, torch.where(everything, main_slots, -1), draft_slots]
    queries = torch.cat(recompute, dim=1)
    attn_mask = torch.ones(*queries.shape, canvas.size, dtype=torch.bool, device=versions.device)
    in_block = torch.zeros(rows, canvas.size, dtype=torch.bool, device=versions.device)
    in_block = in_block.scatter(1, view.slots, view.exists)
    is_draft = queries >= len(main_slots)
    attn_mask &= ~(is_draft[:, :, None] & in_block[:, None])
    output_slots = torch.cat([block_slots, draft_slots], dim=1)
    output_slots = torch.where(versions.flatten(1).eq(canvas.vocab.mask or 0), output_slots, -1)
    logits = exclude_mask(denoise(queries, output_slots, attn_mask=attn_mask), canvas.vocab.mask)
    return logits.view(rows, depth, width, -1)


def draft_ahead(
    rule: AcceptanceRule,
    state: BlockState,
    depth: int,
    block: Tensor,
    exists: Tensor,
    predictions: Predictions,
    mask_id: int | None,
) -> Drafts:
    """Predict the block after 1 .. ``depth`` more steps, from the last pass alone.

    Args:
        rule: Decides which tokens each step accepts.
        state: The block of each row, for the step after the last.
        depth: Steps to draft.
        block: Its tokens now, (B, W).
        exists: Which of its slots exist, (B, W) bool.
        predictions: The last predictions for its slots.
        mask_id: The mask token.
    """
    drafts, masked = [], (block == mask_id) & exists
    for step in range(depth):
        here = state._replace(
            masked_slots=torch.where(masked, 0, -1), block_step=state.block_step + step
        )
        accepted = rule.accept(predictions, here) & masked
        block, masked = torch.where(accepted, predictions.tokens, block), masked & ~accepted
        drafts.append(block)
    if not drafts:
        return Drafts(block[:, None][:, :0], torch.zeros_like(state.active))
    return Drafts(torch.stack(drafts, dim=1), state.active)
