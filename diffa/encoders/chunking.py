"""Cut rows of audio into pieces that an encoder can read, and join what it says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffa.audio import samples_of
from diffa.types import Features

Read = Callable[[Tensor, list[int]], Sequence[Tensor]]
"""Waves (M, S) and the true samples of each -> states, each (M, T, width)."""


def read(
    audio: Tensor,
    lengths: Tensor,
    hear: Read,
    *,
    frames: Callable[[int], int],
    window: int | None,
    least: int,
    together: bool,
) -> Features:
    """Run ``hear`` over audio (B, S) with true lengths (B,) and join its states row by row.

    Args:
        audio: samples; what lies past a row's length is never read.
        lengths: true samples of each row.
        hear: the encoder.
        frames: how many frames come from a piece of so many samples.
        window: most samples of a piece; None reads a row as a whole.
        least: samples the encoder needs; shorter pieces get zeros.
        together: pieces of different lengths may share a batch, because the encoder masks. Else
            only pieces of one length do: a row then never meets another row's padding.

    Raises:
        AudioError: audio and lengths do not fit.
    """
    rows = cut(audio, lengths, window)
    waves = [wave for row in rows for wave in row]
    heard: list[Tensor] = [audio.new_zeros(0)] * len(waves)
    for group in _groups([len(wave) for wave in waves], together):
        sizes = [max(least, len(waves[i])) for i in group]
        batch = audio.new_zeros(len(group), max(sizes))
        for place, i in enumerate(group):
            batch[place, : len(waves[i])] = waves[i]
        states = torch.stack(list(hear(batch, sizes)), dim=2)  # (M, T, layers + 1, width)
        for place, i in enumerate(group):
            heard[i] = states[place, : max(1, frames(sizes[place]))]
    counts = [
        [max(1, frames(max(least, len(wave)))) if len(wave) else 0 for wave in r] for r in rows
    ]
    return _join(heard, counts, lengths.to(audio.device))


def cut(audio: Tensor, lengths: Tensor, window: int | None) -> list[list[Tensor]]:
    """Return each row's true samples in pieces of ``window``; a row without samples has one."""
    pairs = zip(audio, samples_of(audio, lengths), strict=True)
    rows = [row[:length] for row, length in pairs]
    return [list(row.split(window)) if window and len(row) else [row] for row in rows]


def _groups(sizes: list[int], together: bool) -> list[list[int]]:
    """Return which pieces share a batch."""
    if together:
        return [list(range(len(sizes)))] if sizes else []
    by_size: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        by_size.setdefault(size, []).append(i)
    return list(by_size.values())


def _join(heard: list[Tensor], counts: list[list[int]], lengths: Tensor) -> Features:
    """Put pieces (T, layers + 1, width) behind one another, zero past each row's frames."""
    pieces = iter(heard)
    rows = [torch.cat([next(pieces) for _ in row]) for row in counts]
    states = pad_sequence(rows, batch_first=True)
    return Features(
        states=states.unbind(dim=2),
        lengths=lengths.new_tensor([sum(row) for row in counts]),
        extents=lengths.new_tensor([len(row) for row in rows]),
    )
