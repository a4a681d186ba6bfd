"""Split rows of audio into windows that an encoder can read, and join its frames again.

row 0  [ window | window | wi ]        windows of equal size (or all, if the encoder masks
row 1  [ windo ]                  ->   padding) share one batch (M, samples)
                                  ->   states (M, T, width), joined per row: (B, T', width)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffa.audio import samples_of
from diffa.types import Features

Encode = Callable[[Tensor, list[int]], Sequence[Tensor]]
"""Windows (M, samples) and the size of each, in samples -> states, each (M, T, width)."""


def encode_windows(
    audio: Tensor,
    lengths: Tensor,
    encode: Encode,
    *,
    count_frames: Callable[[int], int],
    window_samples: int | None,
    padded_size: Callable[[int, int], int],
    masks_padding: bool = False,
) -> Features:
    """Run ``encode`` over audio (B, S) with true lengths (B,) and join its states row by row.

    Args:
        audio: samples; what lies past a row's length is never read.
        lengths: true samples of each row.
        encode: runs the encoder over a batch of windows.
        count_frames: maps the size of a window, in samples, to its frames.
        window_samples: size of the largest window. None: a row is one window.
        padded_size: maps the true samples of a window and the number of windows of its row to
            the size that is read; zeros fill it up.
        masks_padding: whether windows of different sizes share a batch because the encoder masks
            their padding. Otherwise only equal sizes do, so no row meets another row's padding.

    Raises:
        AudioError: audio and lengths do not fit.
    """
    rows = split_windows(audio, lengths, window_samples)
    windows = [window for row in rows for window in row]
    sizes = [padded_size(len(window), len(row)) for row in rows for window in row]
    counts = [max(1, count_frames(size)) for size in sizes]
    frames: list[list[Tensor]] = [[] for _ in windows]  # of every window: (T, width) per layer
    for group in _batches(sizes, masks_padding):
        batch = audio.new_zeros(len(group), max(sizes[i] for i in group))
        for place, i in enumerate(group):
            batch[place, : len(windows[i])] = windows[i]
        states = encode(batch, [sizes[i] for i in group])
        if len(group) == len(rows) == len(windows) and {*counts} == {states[0].shape[1]}:
            joined = tuple(states)  # one full window per row: nothing to copy
            break
        for place, i in enumerate(group):
            frames[i] = [state[place, : counts[i]] for state in states]
    else:
        joined = _join(rows, frames)
    row_counts, real_counts, i = [], [], 0
    for row in rows:
        row_counts.append(sum(counts[i : i + len(row)]))
        real_counts.append(row_counts[-1] if len(row[0]) else 0)
        i += len(row)
    new = lengths.to(audio.device).new_tensor
    return Features(joined, lengths=new(real_counts), extents=new(row_counts))


def split_windows(audio: Tensor, lengths: Tensor, size: int | None) -> list[list[Tensor]]:
    """Return each row's true samples in windows of ``size``; an empty row has one empty window."""
    pairs = zip(audio, samples_of(audio, lengths), strict=True)
    rows = [row[:length] for row, length in pairs]
    return [list(row.split(size)) if size and len(row) else [row] for row in rows]


def length_mask(sizes: list[int], like: Tensor) -> Tensor:
    """Return which places of ``like`` (M, S, ...) lie within each row's size, (M, S) bool."""
    ends = torch.tensor(sizes, device=like.device)
    return torch.arange(like.shape[1], device=like.device) < ends[:, None]


def _batches(sizes: list[int], masks_padding: bool) -> list[list[int]]:
    """Return which windows share a batch."""
    if masks_padding:
        return [list(range(len(sizes)))] if sizes else []
    by_size: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        by_size.setdefault(size, []).append(i)
    # In order of size: the sum of the groups' gradients depends on the order to the last bit.
    return [by_size[size] for size in sorted(by_size)]


def _join(rows: list[list[Tensor]], frames: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Return states (B, T, width) of every layer, zero past each row's frames."""
    states = []
    for layer in zip(*frames, strict=True):
        windows = iter(layer)
        joined = [torch.cat([next(windows) for _ in row]) for row in rows]
        states.append(pad_sequence(joined, batch_first=True))
    return tuple(states)
