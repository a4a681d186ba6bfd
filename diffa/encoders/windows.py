"""Running a Whisper encoder over audio of any length, window after window."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from diffa.audio import samples_of
from diffa.encoders.mel import Mel, log_mel
from diffa.types import Features


def listen(encoder: Any, mel: Mel, audio: Tensor, lengths: Tensor) -> Features:
    """Return every hidden state of ``encoder`` for audio (B, S) with true lengths (B,) in samples.

    ``encoder`` is a transformers ``WhisperEncoder``. Audio longer than its window is read in
    several windows whose frames follow one another; the windows of all rows form one batch.
    """
    frames = int(encoder.config.max_source_positions)  # of one window
    samples = 2 * frames * mel.hop
    counts = _window_counts(audio, lengths, samples)
    chunks, used = _cut(audio, lengths, samples, counts)
    states = hidden_states(encoder, log_mel(chunks, mel))
    taken = lengths.to(audio.device)
    return Features(
        states=tuple(_join(state, used, len(counts)) for state in states),
        lengths=_ceil(_ceil(taken, mel.hop), 2),
        extents=_ceil(taken, samples).clamp(min=1) * frames,
    )


def hidden_states(encoder: Any, features: Tensor) -> list[Tensor]:
    """Return the layers + 1 states (M, T, width) of a ``WhisperEncoder`` for mels (M, bins, 2T).

    Entry 0 is the convolutions plus positions, the last one follows the final LayerNorm.
    The layers are run one by one because transformers records a layer that layerdrop skips
    nowhere, which would move every state after it.
    """
    features = features.to(encoder.conv1.weight.dtype)
    hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features))))
    hidden = rearrange(hidden, "m w t -> m t w") + encoder.embed_positions.weight
    hidden = F.dropout(hidden, encoder.config.dropout, encoder.training)
    states = [hidden]
    for layer in encoder.layers:
        if not (encoder.training and _drop(encoder.config.encoder_layerdrop)):
            out = layer(hidden, None)
            hidden = out[0] if isinstance(out, tuple) else out  # a tuple in transformers 5.0
        states.append(hidden)
    states[-1] = encoder.layer_norm(hidden)
    return states


def _drop(chance: float) -> bool:
    return chance > 0 and torch.rand((), device="cpu").item() < chance


def _window_counts(audio: Tensor, lengths: Tensor, samples: int) -> list[int]:
    """Return how many windows each row needs, at least one; raises AudioError."""
    return [max(1, -(-length // samples)) for length in samples_of(audio, lengths)]


def _cut(
    audio: Tensor, lengths: Tensor, samples: int, counts: list[int]
) -> tuple[Tensor, Tensor | None]:
    """Return windows (M, samples), zero past each row's length, and which of the windows
    (B, windows) they are; None where every row has them all."""
    most = max(counts, default=1)
    padded = F.pad(audio, (0, most * samples - audio.shape[1]))  # a negative pad cuts
    within = torch.arange(most * samples, device=audio.device) < lengths.to(audio.device)[:, None]
    grid = rearrange(torch.where(within, padded, 0), "b (w s) -> b w s", w=most)
    if min(counts, default=1) == most:
        return rearrange(grid, "b w s -> (b w) s"), None
    needed = torch.tensor(counts, device=audio.device)[:, None]
    used = torch.arange(most, device=audio.device) < needed
    return grid[used], used


def _join(state: Tensor, used: Tensor | None, rows: int) -> Tensor:
    """Return windows (M, T, width) as rows (B, windows * T, width), zero where a row has none."""
    if used is None:
        return rearrange(state, "(b w) t d -> b (w t) d", b=rows)
    grid = state.new_zeros(*used.shape, *state.shape[1:])
    grid[used] = state
    return rearrange(grid, "b w t d -> b (w t) d")


def _ceil(count: Tensor, divisor: int) -> Tensor:
    return -(-count // divisor)
