"""Initialise small Transformers with attention to neighbours and to equal tokens.

A language model of a million parameters needs thousands of steps before its attention copies at
all, and never learns the letter of a correct choice. Heads that first attend at fixed offsets (as
``encoder_heads.init_local`` makes an encoder's), to equal tokens, and to tokens before an equal
token save most of these steps. All weights are trained further.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffa.backbones.transformer import Block
from diffa.trainers.checkpoints import TrainingError

CONSTANT = 4  # dimensions with one value in every embedding, as the model has no biases
_PEAK = 12.0  # score of an offset head at its offset
_FAST = 3  # RoPE pairs that distinguish adjacent offsets
_SLOW = 400.0  # wavelength, in tokens, from which a pair hardly rotates within a recording
# Offsets of the first heads of each layer, positive to the left; all other heads attend to equal
# tokens.
_OFFSETS: tuple[tuple[int, ...], ...] = ((1, -1, 2, -2), (1, 2), (1,))
_CHOICE = -2  # the letter of a choice is two tokens before its word


@torch.no_grad()
def init_for_copying(transformer: Any, seed: int) -> None:
    """Draw a ``Transformer``'s weights so that it copies what it attends to.

    Values and attention outputs are each other's transpose and the head is the embedding, so the
    model predicts the token that it attends to. The last dimensions, as many as a head has, are
    zero in every embedding: the first layer writes there what is two tokens to the right, by
    which the second layer finds the letter of a choice.

    Args:
        transformer: The Transformer; its weights are replaced.
        seed: Random seed.

    Raises:
        TrainingError: Query heads share key heads.
    """
    config = transformer.config
    if config.num_kv_heads != config.num_heads:
        raise TrainingError(
            "init_copying needs a key head per query head, got "
            f"{config.num_kv_heads} for {config.num_heads}"
        )
    generator = torch.Generator().manual_seed(seed)
    _draw_weights(transformer, generator)
    transformer.wte.weight[:, :CONSTANT] = 0.7
    transformer.wte.weight[:, -config.head_dim :] = 0.0
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    slow = (2 * math.pi / frequencies > _SLOW).float().repeat(2)[:, None]
    for layer, block in enumerate(transformer.blocks):
        rotation = _orthogonal(config.hidden_size, generator)
        block.v_proj.weight.copy_(rotation)
        block.attn_out.weight.copy_(0.5 * rotation.T)
        offsets = _OFFSETS[layer] if layer < len(_OFFSETS) else ()
        for head in range(config.num_heads):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            if head < len(offsets):
                _attend_at_offset(block, rows, *_offset_vectors(offsets[head], frequencies))
            else:
                shared = _orthogonal(config.hidden_size, generator)[rows] * slow
                _attend_to_equal(block, rows, 0.75 * shared, generator)
    if (
        _CHOICE in _OFFSETS[0][: config.num_heads]
        and len(transformer.blocks) > 1
        and config.num_heads > 2
    ):
        _link_choices(transformer, _OFFSETS[0].index(_CHOICE), len(_OFFSETS[1]), slow, generator)
    if not config.tie_word_embeddings:
        transformer.ff_out.weight.copy_(0.15 * transformer.wte.weight)


def _link_choices(
    transformer: Any, ahead: int, finder: int, slow: Tensor, generator: torch.Generator
) -> None:
    """Let one head write what is ahead, and one of the next layer attend to the same content."""
    size, width = transformer.config.head_dim, transformer.config.hidden_size
    first, second = transformer.blocks[:2]
    rows = slice(ahead * size, (ahead + 1) * size)
    first.v_proj.weight[rows] = 0.0
    first.v_proj.weight[rows, :-size] = _orthogonal(width - size, generator)[:size]
    first.attn_out.weight[:, rows] = 0.0
    first.attn_out.weight[-size:, rows] = torch.eye(size)
    rows = slice(finder * size, (finder + 1) * size)
    shared = 1.5 * slow * _orthogonal(size, generator)
    for weight in (second.q_proj.weight, second.k_proj.weight):
        weight[rows] = 0.0
        weight[rows, -size:] = shared
    second.attn_out.weight[:, rows] *= 3.0


def _draw_weights(transformer: Any, generator: torch.Generator) -> None:
    """Draw matrices of unit gain; residual outputs are scaled down by depth."""
    residual_scale = 1 / math.sqrt(2 * len(transformer.blocks))
    for name, weight in transformer.named_parameters():
        if weight.dim() < 2:
            nn.init.zeros_(weight) if name.endswith("bias") else nn.init.ones_(weight)
            continue
        size = 0.5 if name.startswith("wte") else 1 / math.sqrt(weight.shape[1])
        residual = name.startswith("blocks.") and "_out." in name
        noise = torch.randn(weight.shape, generator=generator)  # on the CPU, for every device
        weight.copy_(size * (residual_scale if residual else 1) * noise)


def _orthogonal(width: int, generator: torch.Generator) -> Tensor:
    matrix: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return matrix


def _attend_at_offset(block: Block, rows: slice, query: Tensor, key: Tensor) -> None:
    """Let a head score by offset: q and k read the constant part, and RoPE rotates them."""
    for weight, vector in ((block.q_proj.weight, query), (block.k_proj.weight, key)):
        weight[rows] *= 0.3
        weight[rows, :CONSTANT] = vector[:, None] / CONSTANT


def _offset_vectors(offset: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return a query and a key (D,) whose score under RoPE peaks, at ``_PEAK``, at an offset."""
    half = len(frequencies)
    fast = min(_FAST, half)
    query, key = torch.zeros(2 * half), torch.zeros(2 * half)
    size = math.sqrt(_PEAK * math.sqrt(2 * half) / fast)
    query[:fast] = size
    key[:fast] = size * torch.cos(frequencies[:fast] * offset)
    key[half : half + fast] = size * torch.sin(frequencies[:fast] * offset)
    return query, key


def _attend_to_equal(block: Block, rows: slice, shared: Tensor, generator: torch.Generator) -> None:
    """Let a head attend to equal tokens: its queries and keys are partly the same."""
    for weight in (block.q_proj.weight, block.k_proj.weight):
        noise = torch.randn(shared.shape, generator=generator)
        weight[rows] = shared + 0.5 * noise / math.sqrt(shared.shape[1])
