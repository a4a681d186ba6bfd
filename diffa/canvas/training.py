"""What an objective asks of the backbone: one corruption or two, answers whole or by blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffa.canvas.batch import forward_rows, gather_slots, text_slots
from diffa.canvas.canvas import interleave
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError
from diffa.types import Backbone, BlockObjective, Loss, Objective, SecondCorruption


def compute_loss(
    backbone: Backbone,
    objective: Objective,
    tokens: Tensor,
    answer: Tensor,
    seeds: Tensor,
    *,
    lengths: Tensor,
    heard: Sequence[Tensor | None] | None = None,
    audio_at: Tensor | None = None,
    reading: Callable[..., Tensor] = forward_rows,
) -> Loss:
    """Corrupt answers, let the backbone read them, and measure the objective.

    An objective may have a ``second`` corruption of the same rows, whose sums join those of the
    first: what was ``heard`` serves both. With a ``block`` it sees the blocks before each one
    as they are. The other arguments are those of ``Model.loss`` and ``inputs.read``.

    Raises:
        SpecError: an objective of blocks, and a ``reading`` of its own.
    """
    block = objective.block_length if isinstance(objective, BlockObjective) else None
    if block is not None and reading is not forward_rows:
        raise SpecError("an objective with a block reads rows in its own way: leave packing out")
    if block is not None:
        reading = partial(forward_blocks, plain=tokens, answer=answer, block=block)
    first = objective.corrupt(tokens, answer, seeds)
    hidden = reading(backbone, first.tokens, lengths, heard, audio_at)
    total, weight = objective.loss(hidden, backbone.head, tokens, first)
    other = None
    if isinstance(objective, SecondCorruption):
        other = objective.second(tokens, first, seeds)
    if other is not None:
        again = reading(backbone, other.tokens, lengths, heard, audio_at)
        more, much = objective.loss(again, backbone.head, tokens, other)
        total, weight = total + more, weight + much
    return Loss(total, weight, hidden, first)


def forward_blocks(
    backbone: Any,
    tokens: Tensor,
    lengths: Tensor,
    heard: Sequence[Tensor | None] | None = None,
    audio_at: Tensor | None = None,
    *,
    plain: Tensor,
    answer: Tensor,
    block: int,
) -> Tensor:
    """Read corrupted answers (B, L) block by block, each block behind plain ones, in one pass
    (BD3-LM, arXiv 2503.09573, section 3): a row is its plain tokens and then a corrupted copy of
    its answer, at the positions of the originals.

    Returns:
        Hidden states (B, L, W): those of the copies where the answer is.
    """
    at = torch.zeros_like(lengths) if audio_at is None else audio_at
    sounds = [None] * len(tokens) if heard is None else list(heard)
    sizes = lengths.tolist()
    copies = [own[:size].nonzero()[:, 0] for own, size in zip(answer, sizes, strict=True)]
    rows = [
        torch.cat([own[:size], noisy[copy]])
        for own, noisy, size, copy in zip(plain, tokens, sizes, copies, strict=True)
    ]
    embeds, text = interleave(rows, sounds, at.tolist(), backbone.embed)
    slots = torch.arange(text.shape[1], device=text.device)
    index = text_slots(tokens, sounds, at)
    index, positions, attn_mask = block_layout(index, copies, embeds.lengths, len(slots), block)
    context = AttentionContext(valid=slots < embeds.lengths[:, None], attn_mask=attn_mask)
    hidden: Tensor = backbone(embeds.values, positions, context)
    return gather_slots(hidden, index)


def block_layout(
    index: Tensor, copies: Sequence[Tensor], lengths: Tensor, width: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Let copies at the end of each row of ``lengths`` (B,) slots stand where their originals do.

    Args:
        index: the slot of each column of the rows' tokens, (B, L).
        copies: of each row, the columns that are copied, (A,).
        lengths: slots of each row, copies included.
        width: slots of the longest.
        block: answer tokens per block.

    Returns:
        The slot that each column is read off, (B, L); positions (B, S); and what each slot sees
        (B, S, S): a plain one what is plain up to its own block, a copy what is plain before its
        block, and the copies of its block. The prompt comes before all blocks.
    """
    index = index.clone()
    positions = torch.arange(width, device=index.device).repeat(len(index), 1)
    number, twin = torch.zeros_like(positions), torch.zeros_like(positions, dtype=torch.bool)
    for row, copy in enumerate(copies):
        last = int(lengths[row])
        behind = torch.arange(last - len(copy), last, device=index.device)
        original = index[row, copy]
        blocks = torch.arange(len(copy), device=index.device) // block + 1
        positions[row, behind] = original
        number[row, original], number[row, behind] = blocks, blocks
        twin[row, behind] = True
        index[row, copy] = behind
    before = number[:, None] < number[:, :, None]
    same = number[:, None] == number[:, :, None]
    asks, shown = twin[:, :, None], twin[:, None]
    return index, positions, (~shown & (before | (same & ~asks))) | (shown & asks & same)
