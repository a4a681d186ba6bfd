"""The training forward: corrupt the answers, run the backbone, compute the objective's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from diffa.canvas.batch import forward_rows, gather_slots, text_slots
from diffa.canvas.canvas import insert_audio
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError
from diffa.types import (
    Backbone,
    BlockObjective,
    CountingObjective,
    Loss,
    Noised,
    Objective,
    SecondCorruption,
)


def compute_loss(
    backbone: Backbone,
    objective: Objective,
    tokens: Tensor,
    answer: Tensor,
    seeds: Tensor,
    *,
    lengths: Tensor,
    audio_embeds: Sequence[Tensor | None] | None = None,
    audio_at: Tensor | None = None,
    forward: Callable[..., Tensor] = forward_rows,
) -> Loss:
    """Corrupt answers, run the backbone over the rows, and return the objective's loss.

    The sums of a ``SecondCorruption`` join those of the first; both use the same audio. A
    ``BlockObjective`` attends to the blocks before each one as they are. The other arguments are
    those of ``Model.loss`` and ``forward_rows``.

    Raises:
        SpecError: A ``BlockObjective`` with a ``forward`` of its own.
    """
    block_length = objective.block_length if isinstance(objective, BlockObjective) else None
    if block_length is not None:
        if forward is not forward_rows:
            raise SpecError(
                "an objective with a block reads rows in its own way: leave packing out"
            )
        forward = partial(forward_blocks, clean=tokens, answer=answer, block_length=block_length)
    first = objective.corrupt(tokens, answer, seeds)
    hidden = forward(backbone, first.tokens, lengths, audio_embeds, audio_at)
    sums = _loss_sums(objective, hidden, backbone.head, tokens, first)
    second = None
    if isinstance(objective, SecondCorruption):
        second = objective.second(tokens, first, seeds)
    if second is not None:
        other_hidden = forward(backbone, second.tokens, lengths, audio_embeds, audio_at)
        other_sums = _loss_sums(objective, other_hidden, backbone.head, tokens, second)
        sums = tuple(a + b for a, b in zip(sums, other_sums, strict=True))
    return Loss(sums[0], sums[1], hidden, first, *sums[2:])


def _loss_sums(
    objective: Objective,
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    tokens: Tensor,
    noised: Noised,
) -> tuple[Tensor, ...]:
    """Return the summed loss and its weight, then the token counts of an objective that counts."""
    if isinstance(objective, CountingObjective):
        return tuple(objective.measure(hidden, head, tokens, noised))
    return tuple(objective.loss(hidden, head, tokens, noised))


def forward_blocks(
    backbone: Backbone,
    tokens: Tensor,
    lengths: Tensor,
    audio_embeds: Sequence[Tensor | None] | None = None,
    audio_at: Tensor | None = None,
    *,
    clean: Tensor,
    answer: Tensor,
    block_length: int,
) -> Tensor:
    """Run a backbone over corrupted answers block by block, each after clean blocks, in one pass.

    A row is its clean tokens, then a corrupted copy of its answer at the positions of the
    originals (BD3-LM, arXiv 2503.09573, section 3)::

        prompt  clean block 1  clean block 2 | noisy block 1  noisy block 2

    Args:
        backbone: Embeds the tokens and reads the rows.
        tokens: Prompts with corrupted answers, (B, L).
        lengths: True tokens per row, (B,).
        audio_embeds: Embeddings (N, W) of each row's audio, or None.
        audio_at: Index before which each row's audio goes, (B,). Default: 0.
        clean: The tokens before corruption, (B, L).
        answer: Which tokens belong to the answer, (B, L) bool.
        block_length: Answer tokens per block.

    Returns:
        Hidden states (B, L, W): those of the copies where the answer is.
    """
    at = torch.zeros_like(lengths) if audio_at is None else audio_at
    audio = [None] * len(tokens) if audio_embeds is None else list(audio_embeds)
    sizes = lengths.tolist()
    copied = [own[:size].nonzero()[:, 0] for own, size in zip(answer, sizes, strict=True)]
    rows = [
        torch.cat([own[:size], noisy[columns]])
        for own, noisy, size, columns in zip(clean, tokens, sizes, copied, strict=True)
    ]
    embeds, text = insert_audio(rows, audio, at.tolist(), backbone.embed)
    num_slots = text.shape[1]
    slots, positions, attn_mask = block_layout(
        text_slots(tokens, audio, at), copied, embeds.lengths, num_slots, block_length
    )
    valid = torch.arange(num_slots, device=text.device) < embeds.lengths[:, None]
    hidden = backbone(embeds.values, positions, AttentionContext(valid=valid, attn_mask=attn_mask))
    return gather_slots(hidden, slots)


def block_layout(
    slots: Tensor, copied: Sequence[Tensor], lengths: Tensor, num_slots: int, block_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the copies of ``forward_blocks`` are and what they may attend to.

    Args:
        slots: Slot of each of the rows' tokens, (B, L).
        copied: Indices of the tokens that are copied to the end of each row, (A,).
        lengths: Slots of each row, copies included, (B,).
        num_slots: Slots of the longest row, S.
        block_length: Answer tokens per block.

    Returns:
        The slot whose state each token takes, (B, L); positions (B, S); and the attention mask
        (B, S, S). A clean slot attends to clean slots up to its own block; a copy to clean slots
        before its block and to the copies of its block. The prompt is block 0.
    """
    slots = slots.clone()
    positions = torch.arange(num_slots, device=slots.device).repeat(len(slots), 1)
    block, noisy = torch.zeros_like(positions), torch.zeros_like(positions, dtype=torch.bool)
    for row, columns in enumerate(copied):
        end = int(lengths[row])
        copies = torch.arange(end - len(columns), end, device=slots.device)
        originals = slots[row, columns]
        numbers = torch.arange(len(columns), device=slots.device) // block_length + 1
        positions[row, copies] = originals
        block[row, originals], block[row, copies] = numbers, numbers
        noisy[row, copies] = True
        slots[row, columns] = copies
    before = block[:, None] < block[:, :, None]
    same = block[:, None] == block[:, :, None]
    query, key = noisy[:, :, None], noisy[:, None]
    return slots, positions, (~key & (before | (same & ~query))) | (key & query & same)
