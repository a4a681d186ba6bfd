"""A start for small Transformers: attention that finds neighbours and equal tokens.

A language model of a million parameters needs thousands of steps before its attention copies at
all, and learns the letter of a right choice never. Beginning with heads that look at fixed offsets
(as ``listening.start_local`` does for encoders), at equal tokens, and at tokens before an equal
token saves most of that. Everything learns on from there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffa.trainers.checkpoints import TrainingError

CONSTANT = 4  # dimensions that are the same in every embedding: the model has no biases
_PEAK = 12.0  # an aimed head's score at its offset
_FAST = 3  # RoPE pairs that tell neighbouring offsets apart
_SLOW = 400.0  # wavelength in tokens from which a pair hardly turns within a recording
# At which offsets the first heads of each layer begin to look, positive being back; all other
# heads begin by looking at equal tokens.
_PLAN: tuple[tuple[int, ...], ...] = ((1, -1, 2, -2), (1, 2), (1,))
_AHEAD = -2  # a choice's letter stands two tokens before its word


@torch.no_grad()
def start(transformer: Any, seed: int) -> None:
    """Draw a ``Transformer``'s weights anew so that it begins by copying.

    Values and attention outputs are each other's transpose and the head is the embedding, so that
    what is attended to is said. The last dimensions, as many as a head has, are zero in every
    embedding: they begin by holding what stands two tokens ahead, by which the second layer finds
    the letter of a choice.

    Raises:
        TrainingError: query heads share key heads.
    """
    config = transformer.config
    if config.num_kv_heads != config.num_heads:
        raise TrainingError(
            f"aids.start needs a key head per query head, got {config.num_kv_heads} "
            f"for {config.num_heads}"
        )
    generator = torch.Generator().manual_seed(seed)
    _plain(transformer, generator)
    transformer.wte.weight[:, :CONSTANT] = 0.7
    transformer.wte.weight[:, -config.head_dim :] = 0.0
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    still = (2 * math.pi / frequencies > _SLOW).float().repeat(2)[:, None]
    for layer, block in enumerate(transformer.blocks):
        turned = _orthogonal(config.hidden_size, generator)
        block.v_proj.weight.copy_(turned)
        block.attn_out.weight.copy_(0.5 * turned.T)
        plan = _PLAN[layer] if layer < len(_PLAN) else ()
        for head in range(config.num_heads):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            if head < len(plan):
                _aim(block, rows, *_looking(plan[head], frequencies))
            else:
                shared = _orthogonal(config.hidden_size, generator)[rows] * still
                _equal(block, rows, 0.75 * shared, generator)
    if (
        _AHEAD in _PLAN[0][: config.num_heads]
        and len(transformer.blocks) > 1
        and config.num_heads > 2
    ):
        _choosing(transformer, _PLAN[0].index(_AHEAD), len(_PLAN[1]), still, generator)
    if not config.tie_word_embeddings:
        transformer.ff_out.weight.copy_(0.15 * transformer.wte.weight)


def _choosing(
    transformer: Any, ahead: int, finder: int, still: Tensor, generator: torch.Generator
) -> None:
    """Let a head of the first layer keep what is ahead, and one of the second look for the same."""
    size, width = transformer.config.head_dim, transformer.config.hidden_size
    first, second = transformer.blocks[:2]
    rows = slice(ahead * size, (ahead + 1) * size)
    first.v_proj.weight[rows] = 0.0
    first.v_proj.weight[rows, :-size] = _orthogonal(width - size, generator)[:size]
    first.attn_out.weight[:, rows] = 0.0
    first.attn_out.weight[-size:, rows] = torch.eye(size)
    rows = slice(finder * size, (finder + 1) * size)
    shared = 1.5 * still * _orthogonal(size, generator)
    for weight in (second.q_proj.weight, second.k_proj.weight):
        weight[rows] = 0.0
        weight[rows, -size:] = shared
    second.attn_out.weight[:, rows] *= 3.0


def _plain(transformer: Any, generator: torch.Generator) -> None:
    """Matrices that keep their input's size, residual outputs scaled down by depth."""
    deep = 1 / math.sqrt(2 * len(transformer.blocks))
    for name, weight in transformer.named_parameters():
        if weight.dim() < 2:
            nn.init.zeros_(weight) if name.endswith("bias") else nn.init.ones_(weight)
            continue
        size = 0.5 if name.startswith("wte") else 1 / math.sqrt(weight.shape[1])
        residual = name.startswith("blocks.") and "_out." in name
        drawn = torch.randn(weight.shape, generator=generator)  # on the CPU, wherever weights are
        weight.copy_(size * (deep if residual else 1) * drawn)


def _orthogonal(width: int, generator: torch.Generator) -> Tensor:
    turned: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return turned


def _aim(block: Any, rows: slice, query: Tensor, key: Tensor) -> None:
    """Make a head score by offset: q and k read the constant part, RoPE does the rest."""
    for weight, vector in ((block.q_proj.weight, query), (block.k_proj.weight, key)):
        weight[rows] *= 0.3
        weight[rows, :CONSTANT] = vector[:, None] / CONSTANT


def _looking(offset: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """A query and a key (D,) whose score under RoPE is greatest, ``_PEAK``, at an offset."""
    half = len(frequencies)
    fast = min(_FAST, half)
    query, key = torch.zeros(2 * half), torch.zeros(2 * half)
    size = math.sqrt(_PEAK * math.sqrt(2 * half) / fast)
    query[:fast] = size
    key[:fast] = size * torch.cos(frequencies[:fast] * offset)
    key[half : half + fast] = size * torch.sin(frequencies[:fast] * offset)
    return query, key


def _equal(block: Any, rows: slice, shared: Tensor, generator: torch.Generator) -> None:
    """Make a head look at tokens equal to its own: queries and keys partly alike."""
    for weight in (block.q_proj.weight, block.k_proj.weight):
        noise = torch.randn(shared.shape, generator=generator)
        weight[rows] = shared + 0.5 * noise / math.sqrt(shared.shape[1])
