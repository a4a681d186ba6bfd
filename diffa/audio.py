"""Recordings: read any file, mix down, resample, check, and pad a batch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.errors import AudioError


def read(path: str | Path) -> tuple[Tensor, int]:
    """Return the waveform (S,) of a file, float32 and mono, and its samples per second.

    WAV, FLAC, OGG and MP3 through soundfile; m4a, webm and others through PyAV
    (``pip install 'diffa-audio[audio]'``). Raises AudioError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise AudioError(f"there is no file {path}")
    if path.is_dir():
        raise AudioError(f"{path} is a folder: give one recording")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is an empty file")
    samples, rate = _soundfile(path) or _pyav(path)
    if samples.numel() == 0:
        raise AudioError(f"{path} holds no samples")
    return samples.mean(0), rate


def _soundfile(path: Path) -> tuple[Tensor, int] | None:
    """Return samples (channels, S) and their rate, or None where libsndfile knows no such file."""
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return None
    return torch.from_numpy(samples).T, int(rate)


def _pyav(path: Path) -> tuple[Tensor, int]:
    """Return samples (channels, S) and their rate, decoded by FFmpeg's libraries."""
    try:
        av: Any = import_module("av")
    except ImportError as error:
        raise AudioError(
            f"{path} cannot be read as WAV, FLAC, OGG or MP3: it is damaged, not audio, or in "
            "another format (m4a, webm, ...) that pip install 'diffa-audio[audio]' adds"
        ) from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            frames = [_planar(frame) for frame in container.decode(stream)]
            return torch.cat(frames or [torch.empty(1, 0)], dim=1), int(stream.rate)
    except (av.error.FFmpegError, IndexError) as error:
        raise AudioError(f"{path} holds no audio that can be decoded: {error}") from error


def _planar(frame: Any) -> Tensor:
    """Return one frame of PyAV as floats (channels, S); integer formats are scaled to [-1, 1]."""
    samples = torch.from_numpy(frame.to_ndarray())
    if not frame.format.is_planar:
        samples = samples.view(-1, len(frame.layout.channels)).T
    if samples.dtype == torch.uint8:
        return (samples.float() - 128) / 128
    scale = 1.0 if samples.is_floating_point() else float(torch.iinfo(samples.dtype).max) + 1
    return samples.float() / scale


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Return ``waveform`` (..., S) at ``to_rate`` samples per second; raises AudioError."""
    if from_rate < 1 or to_rate < 1:
        raise AudioError(f"sample rates must be at least 1, got {from_rate} and {to_rate}")
    if from_rate == to_rate:
        return waveform
    try:
        from torchaudio.functional import resample as convert
    except Exception as error:  # a torchaudio for another torch raises OSError or RuntimeError
        raise AudioError(
            f"audio at {from_rate} Hz is needed at {to_rate} Hz, but torchaudio does not import "
            f"({type(error).__name__}: {error}): install the torchaudio made for torch "
            f"{torch.__version__}, or give audio at {to_rate} Hz"
        ) from error
    return torch.as_tensor(convert(waveform, from_rate, to_rate))


def prepare(audio: object, rate: int) -> Tensor:
    """Return a waveform (S,), float32 at ``rate``, from a path or from a waveform at ``rate``.

    Raises AudioError for what is missing, empty, not audio, not finite, not floating point or
    not one-dimensional.
    """
    if isinstance(audio, str | Path):
        waveform, found = read(audio)
        _check_finite(waveform, str(audio))
        return resample(waveform, found, rate)
    if not isinstance(audio, Tensor):
        audio = _tensor(audio)
    if not audio.is_floating_point():
        raise AudioError(_dtype_message(audio.dtype))
    if audio.dim() != 1:
        raise AudioError(
            f"a waveform has one dimension, samples; this one has shape {tuple(audio.shape)}: "
            "mix its channels down with audio.mean(channel_dimension), or give a list of waveforms"
        )
    if audio.numel() == 0:
        raise AudioError("the waveform is empty: it has no samples")
    _check_finite(audio, "the waveform")
    return audio.to(torch.float32)


def _tensor(audio: object) -> Tensor:
    if not hasattr(audio, "__array__"):
        raise AudioError(
            f"audio must be a path or a waveform (a torch tensor or a numpy array), "
            f"not {type(audio).__name__}"
        )
    try:
        return torch.from_numpy(np.array(audio))  # a copy: a view may be read-only or reversed
    except (TypeError, ValueError) as error:
        raise AudioError(f"the waveform cannot be read as numbers: {error}") from error


def _dtype_message(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if dtype in (torch.int16, torch.int32):
        return (
            f"the waveform is {name}, but floats between -1 and 1 are needed: "
            f"use audio.float() / {torch.iinfo(dtype).max + 1}"
        )
    return f"the waveform is {name}, but floats between -1 and 1 are needed"


def _check_finite(waveform: Tensor, what: str) -> None:
    bad = (~waveform.isfinite()).nonzero()
    if len(bad):
        raise AudioError(
            f"{what} holds {len(bad)} samples that are NaN or infinite, the first at "
            f"{int(bad[0])}: repair the recording or cut them out"
        )


def pad(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return waveforms (S,) as a batch (B, S), zero past each one's end, and their lengths (B,)."""
    if not waveforms:
        raise AudioError("there are no waveforms to pad")
    lengths = torch.tensor([len(waveform) for waveform in waveforms], device=waveforms[0].device)
    most = max(len(waveform) for waveform in waveforms)
    return torch.stack([F.pad(wave, (0, most - len(wave))) for wave in waveforms]), lengths


def as_batch(audio: Tensor, lengths: Tensor | None, rate: int) -> tuple[Tensor, Tensor]:
    """Return audio (S,) or (B, S) at ``rate`` as float32 (B, S) with the rows' lengths (B,).

    Lengths are in samples; S where None.

    Raises:
        AudioError: audio of another shape, or a row that is empty, not finite or not a waveform.
    """
    audio = torch.as_tensor(audio)
    audio = audio[None] if audio.dim() == 1 else audio
    if audio.dim() != 2:
        raise AudioError(f"audio has shape {tuple(audio.shape)}, expected (S,) or (B, S)")
    if lengths is None:
        lengths = torch.full((len(audio),), audio.shape[1])
    for row, length in zip(audio, lengths.tolist(), strict=True):
        prepare(row[:length], rate)
    return audio.to(torch.float32), lengths


def samples_of(audio: Tensor, lengths: Tensor) -> list[int]:
    """Return the true samples of each row of audio (B, S), given as lengths (B,).

    Raises:
        AudioError: the shapes are others, or a length does not fit the audio.
    """
    if audio.dim() != 2 or lengths.shape != audio.shape[:1]:
        raise AudioError(
            f"audio must be (B, S) with lengths (B,), got {tuple(audio.shape)} "
            f"and {tuple(lengths.shape)}"
        )
    samples: list[int] = lengths.tolist()
    if samples and not 0 <= min(samples) <= max(samples) <= audio.shape[1]:
        raise AudioError(f"lengths {samples} do not fit audio of {audio.shape[1]} samples")
    return samples
