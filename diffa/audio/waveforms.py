"""Waveforms: from files, datasets and arrays; validated, written, and padded to a batch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.audio.decode import AudioTooLongError, check_finite, frame_limit, mix_down, read
from diffa.audio.resampling import resample
from diffa.errors import AudioError
from diffa.runtime.files import expand


def read_dataset_audio(value: Any, folder: Path | None = None) -> tuple[Tensor, int]:
    """Decode a recording in any form in which Hugging Face ``datasets`` hands it out.

    Args:
        value: a path; bytes; a mapping with ``bytes``, ``array`` and ``sampling_rate``, or
            ``path``; or a decoder of torchcodec (``get_all_samples``).
        folder: where relative paths start. Default: the working directory.

    Returns:
        The waveform (S,), mono, and its samples per second.

    Raises:
        AudioError: another form, or a recording that cannot be decoded.
    """
    if hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        value = {"array": decoded.data, "sampling_rate": decoded.sample_rate}
    fields = value if isinstance(value, dict) else {}
    if not fields.get("bytes") and fields.get("array") is not None:
        try:
            samples, rate = torch.as_tensor(fields["array"]), int(fields["sampling_rate"])
        except (KeyError, TypeError, ValueError) as error:
            raise AudioError(f"a recording's samples cannot be read: {error!r}") from error
        if samples.dim() == 2:  # the shorter dimension is the channels, in either order
            samples = samples.to(torch.float32)
            samples, _ = mix_down(samples if len(samples) < samples.shape[1] else samples.T)
        return prepare(samples, rate), rate
    stored = fields.get("bytes") or fields.get("path") or value
    if isinstance(stored, bytes):
        return read(stored)
    if not isinstance(stored, str | Path) or not str(stored):
        raise AudioError(
            f"a recording must be a path, bytes or samples, not {type(value).__name__}"
        )
    return read((folder or Path()) / expand(stored))


def prepare(
    audio: Any, rate: int, *, strict: bool = False, sample_rate: int | None = None
) -> Tensor:
    """Return a waveform (S,), float32 at ``rate``, from any form in which people have audio.

    Args:
        audio: A path, the bytes of a file, a binary file, a waveform (S,) of floats, a pair
            ``(waveform, rate)``, or a recording of ``datasets`` (``read_dataset_audio``).
        rate: Samples per second.
        strict: Raise an error for a file that is cut or damaged, instead of a warning.
        sample_rate: Samples per second of a waveform that comes without. Default: ``rate``.

    Raises:
        AudioError: The audio is missing, empty, not audio, not finite, not floating point or not
            one-dimensional.
    """
    if isinstance(audio, str | Path | bytes) or (
        hasattr(audio, "read") and not hasattr(audio, "get_all_samples")
    ):
        waveform, file_rate = read(audio, strict=strict)
        if len(waveform) * rate / file_rate > frame_limit():
            raise AudioTooLongError(
                f"{str(audio)[:200] if isinstance(audio, str | Path) else 'the recording'} has "
                f"{len(waveform) / file_rate:.0f} s at {file_rate} Hz, too long at {rate} Hz"
            )
        return resample(waveform, file_rate, rate)
    if isinstance(audio, dict) or hasattr(audio, "get_all_samples"):
        waveform, file_rate = read_dataset_audio(audio)
        return resample(waveform, file_rate, rate)
    if isinstance(audio, tuple):
        if len(audio) != 2 or not isinstance(audio[1], int | np.integer):
            raise AudioError("a pair of audio is (waveform, samples per second)")
        return prepare(audio[0], rate, sample_rate=int(audio[1]))
    if sample_rate is not None and sample_rate != rate:
        return resample(prepare(audio, sample_rate), sample_rate, rate)
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
    check_finite(audio, "the waveform")
    samples: Tensor = audio.to(torch.float32)
    return samples


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


def write_wav(path: Path, waveform: np.ndarray[Any, Any], rate: int) -> None:
    """Write a waveform (S,) as a WAV file of 32-bit floats, without a loss.

    libsndfile puts the time of day into such files; equal waveforms need equal bytes.
    """
    data = np.ascontiguousarray(waveform, dtype="<f4").tobytes()
    form = struct.pack("<HHIIHHH", 3, 1, rate, 4 * rate, 4, 32, 0)  # 3: IEEE floats, one channel
    frames = struct.pack("<I", len(data) // 4)
    chunks = ((b"fmt ", form), (b"fact", frames), (b"data", data))
    body = b"".join(name + struct.pack("<I", len(part)) + part for name, part in chunks)
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body)


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
