"""Run an encoder of Whisper's architecture over audio of any length, window after window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.audio import samples_of
from diffa.encoders.mel import Mel, log_mel
from diffa.errors import SpecError
from diffa.types import Features, FeatureSpec

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder


class WindowedWhisper(nn.Module):
    """The forward passes that the encoders of Whisper's architecture share.

    A subclass sets the attributes in its constructor.

    Attributes:
        encoder: transformers' ``WhisperEncoder``.
        mel: log-mel front end of the encoder.
        trailing_silence: seconds of silence after audio shorter than a window. None: fill the window.
        sample_rate: samples per second.
        out: shape of the hidden states.
    """

    encoder: WhisperEncoder
    mel: Mel
    trailing_silence: float | None
    sample_rate: int
    out: FeatureSpec

    @property
    def window_frames(self) -> int:
        """Frames of one full window: the number of the encoder's positions."""
        return int(self.encoder.config.max_source_positions)

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the features of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        return listen(
            self.encoder, self.mel, audio, lengths, trailing_silence=self.trailing_silence
        )

    def encode_log_mel(self, log_mel: Tensor, *, position_offset: int = 0) -> tuple[Tensor, ...]:
        """Return every hidden state for log-mel frames; skips the front end and the windows.

        Use it to train on changed spectrograms (SpecAugment) or on audio shorter than a window.

        Args:
            log_mel: (M, mel bins, 2T), as ``diffa.encoders.mel.log_mel`` returns it.
            position_offset: position of the first frame in the encoder's window;
                ``position_offset`` + T must not exceed ``window_frames``.

        Returns:
            layers + 1 states, each (M, T, width); see ``hidden_states``.
        """
        return tuple(hidden_states(self.encoder, log_mel, position_offset=position_offset))


def listen(
    encoder: WhisperEncoder,
    mel: Mel,
    audio: Tensor,
    lengths: Tensor,
    *,
    trailing_silence: float | None = None,
) -> Features:
    """Return every hidden state of ``encoder`` for audio (B, S) with true lengths (B,) in samples.

    ``encoder`` is a transformers ``WhisperEncoder``. Audio longer than its window is read in
    several windows whose frames follow one another; the windows of all rows form one batch.
    With a ``trailing_silence``, audio that fits in one window is read with just that many seconds of silence
    after it, rounded up to whole seconds, and rows of equal windows form a batch.
    """
    frames = int(encoder.config.max_source_positions)  # of one window
    if trailing_silence is None or not len(lengths):
        return _full(encoder, mel, audio, lengths, frames)
    rate = mel.rate // mel.hop // 2  # frames a second
    silent = round(trailing_silence * mel.rate)
    seconds = [max(1, -(-(size + silent) // mel.rate)) for size in samples_of(audio, lengths)]
    windows = [min(frames, rate * needed) for needed in seconds]
    parts, order = [], []
    for window in sorted(set(windows)):
        rows = [row for row, wanted in enumerate(windows) if wanted == window]
        parts.append(_full(encoder, mel, audio[rows], lengths[rows], window))
        order += rows
    return _stacked(parts, order)


def checked(trailing_silence: float | None) -> float | None:
    """Return a ``trailing_silence``; raises SpecError unless it is a number of seconds or None."""
    if trailing_silence is not None and not (
        math.isfinite(trailing_silence) and trailing_silence >= 0
    ):
        raise SpecError(
            f"trailing_silence must be seconds from 0 on, or None, got {trailing_silence}"
        )
    return trailing_silence


def _stacked(parts: Sequence[Features], order: Sequence[int]) -> Features:
    """Join batches, whose rows stand in ``order``, to one whose rows stand in their own."""
    if len(parts) == 1:
        return parts[0]
    back = torch.tensor(order).argsort().to(parts[0].lengths.device)
    most = max(part.states[0].shape[1] for part in parts)
    states = (
        torch.cat([F.pad(state, (0, 0, 0, most - state.shape[1])) for state in layer])[back]
        for layer in zip(*(part.states for part in parts), strict=True)
    )
    lengths = torch.cat([part.lengths for part in parts])[back]
    return Features(tuple(states), lengths, torch.cat([part.extents for part in parts])[back])


def _full(
    encoder: WhisperEncoder, mel: Mel, audio: Tensor, lengths: Tensor, frames: int
) -> Features:
    """Read rows in windows of ``frames`` frames, as many as each needs."""
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


def hidden_states(
    encoder: WhisperEncoder, features: Tensor, *, position_offset: int = 0
) -> list[Tensor]:
    """Return the layers + 1 states (M, T, width) of a ``WhisperEncoder`` for mels (M, bins, 2T).

    The first frame takes position ``position_offset`` of the encoder's window.

    Entry 0 is the convolutions plus positions, the last one follows the final LayerNorm.
    The layers are run one by one because transformers records a layer that layerdrop skips
    nowhere, which would move every state after it.
    """
    features = features.to(encoder.conv1.weight.dtype)
    hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features))))
    hidden = rearrange(hidden, "m w t -> m t w")
    end = position_offset + hidden.shape[1]
    hidden = hidden + encoder.embed_positions.weight[position_offset:end]
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
