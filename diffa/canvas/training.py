"""The training forward: corrupt the answers, run the backbone, compute the objective's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffa.canvas.batch import forward_rows, gather_slots, text_slots
from diffa.canvas.canvas import insert_audio
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError
from diffa.types import (
    Backbone,
    BlockAttention,
    BlockObjective,
    CountingObjective,
    Embeds,
    Loss,
    Noised,
    Objective,
    SecondCorruption,
    block_attention,
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
    ``BlockObjective``, or a block-causal backbone, attends to the blocks before each one as they
    are. The other arguments are those of ``Model.loss`` and ``forward_rows``.

    Raises:
        SpecError: Blocks with a ``forward`` of its own.
    """
    block_length = objective.block_length if isinstance(objective, BlockObjective) else None
    if block_length is not None or block_attention(backbone) is not None:
        if forward is not forward_rows:
            raise SpecError(
                "block by block, rows are read in a way of their own: leave packing out"
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
    block_length: int | None = None,
) -> Tensor:
    """Run a backbone over corrupted answers block by block, each after clean blocks, in one pass.

    A row is its clean tokens, then a corrupted copy of its answer at the positions of the
    originals (BD3-LM, arXiv 2503.09573, section 3; SDAR, Fast-dLLM v2)::

        prompt  clean block 1  clean block 2 | noisy block 1  noisy block 2

    A block-causal backbone has blocks of its own; where the answer's first one begins in the
    prompt, the copy begins there too. Audio before it is computed once.

    Args:
        backbone: Embeds the tokens and reads the rows.
        tokens: Prompts with corrupted answers, (B, L).
        lengths: True tokens per row, (B,).
        audio_embeds: Embeddings (N, W) of each row's audio, or None.
        audio_at: Index before which each row's audio goes, (B,). Default: 0.
        clean: The tokens before corruption, (B, L).
        answer: Which tokens belong to the answer, (B, L) bool.
        block_length: Answer tokens per block with a bidirectional backbone.

    Returns:
        Hidden states (B, L, W) that predict the tokens: those of the copies where the answer is.
    """
    at = torch.zeros_like(lengths) if audio_at is None else audio_at
    audio = [None] * len(tokens) if audio_embeds is None else list(audio_embeds)

    def embed(rows: Tensor) -> Embeds:
        own = [row[:size] for row, size in zip(rows, lengths.tolist(), strict=True)]
        return insert_audio(own, audio, at.tolist(), backbone.embed)[0]

    before, noisy = embed(clean), embed(tokens)
    slots = text_slots(tokens, audio, at)
    layout = block_layout(slots, answer, before.lengths, block_attention(backbone), block_length)
    rows = [
        torch.cat([own[:size], other[copied]])
        for own, other, size, copied in zip(
            before.values, noisy.values, before.lengths.tolist(), layout.copied, strict=True
        )
    ]
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    sizes = torch.tensor([len(row) for row in rows], device=embeds.device)
    valid = torch.arange(embeds.shape[1], device=embeds.device) < sizes[:, None]
    context = AttentionContext(
        valid=None if bool(valid.all()) else valid,
        attn_mask=layout.attn_mask,
        has_rule=True,
        block_origin=layout.origin,
    )
    return gather_slots(backbone(embeds, layout.positions, context), layout.states)


class BlockLayout(NamedTuple):
    """Where the copies of ``forward_blocks`` are and what they may attend to.

    Attributes:
        copied: Slots (A,) of each row that are copied to its end.
        positions: Position of every slot, copies included, (B, S).
        attn_mask: (B, S, S) bool, or (1, S, S) where all rows are laid out alike. A clean slot
            attends to clean slots up to its own block; a copy to clean slots before its block and
            to the copies of its block.
        states: Slot of the state that predicts each token, (B, L).
        origin: Position (B,) from which a block-causal backbone counts blocks. None: position 0.
    """

    copied: list[Tensor]
    positions: Tensor
    attn_mask: Tensor
    states: Tensor
    origin: Tensor | None


def block_layout(
    slots: Tensor,
    answer: Tensor,
    lengths: Tensor,
    attention: BlockAttention | None,
    block_length: int | None = None,
) -> BlockLayout:
    """Lay out clean rows and the copies of their answers.

    Args:
        slots: Slot of each of the rows' tokens, (B, L).
        answer: Which tokens belong to the answer, (B, L) bool.
        lengths: Slots of each row without copies, (B,).
        attention: How a block-causal backbone attends: copies begin with the first answer's block.
        block_length: Answer tokens per block without ``attention``. The prompt is block 0.
    """
    number, width = len(slots), int(lengths.max())
    real = answer & (slots < lengths[:, None])
    is_answer = torch.zeros(number, width + 1, dtype=torch.bool, device=slots.device)
    is_answer = is_answer.scatter(1, torch.where(real, slots, width), True)[:, :width]
    positions = torch.arange(width, device=slots.device).repeat(number, 1)
    inside, origin = positions < lengths[:, None], None
    if attention is None:
        assert block_length is not None
        block = torch.where(is_answer, (is_answer.cumsum(1) - 1) // block_length + 1, 0)
        copies = is_answer
    else:
        first = torch.where(is_answer, positions, width).amin(dim=1)
        origin = first if attention.from_prompt else None
        block = AttentionContext(block_origin=origin).blocks(positions, attention.length)
        last = (width - 1) * torch.ones_like(first[:, None])
        opening = block.gather(1, torch.minimum(first[:, None], last))
        copies = inside & (block >= opening) & (first < width)[:, None]
    copied = [row.nonzero()[:, 0] for row in copies]
    # Where each slot's copy is: behind the row's true slots.
    copy_of = torch.where(copies, lengths[:, None] + copies.cumsum(1) - 1, positions)
    read = slots if attention is None or not attention.shifted else (slots - 1).clamp(min=0)
    states = copy_of.gather(1, read.clamp(max=width - 1))
    size = int((lengths + copies.sum(dim=1)).max())
    all_positions = torch.arange(size, device=slots.device).repeat(number, 1)
    numbers = torch.zeros_like(all_positions)
    numbers[:, :width] = torch.where(inside, block, numbers[:, :width])
    noisy = torch.zeros_like(all_positions, dtype=torch.bool)
    for row, own in enumerate(copied):
        there = copy_of[row, own]
        all_positions[row, there], numbers[row, there] = own, block[row, own]
        noisy[row, there] = True
    if bool((numbers == numbers[:1]).all() & (noisy == noisy[:1]).all()):
        numbers, noisy = numbers[:1], noisy[:1]  # one mask for all rows
    earlier = numbers[:, None] < numbers[:, :, None]
    same = numbers[:, None] == numbers[:, :, None]
    query, key = noisy[:, :, None], noisy[:, None]
    mask = (~key & (earlier | (same & ~query))) | (key & query & same)
    return BlockLayout(copied, all_positions, mask, states, origin)
