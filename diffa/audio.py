"""Recordings: decode, mix down, resample, validate, and pad a batch."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.errors import AudioError

FORMATS = ("wav", "mp3", "flac", "ogg")
"""Formats that are read without an extra, and the only ones accepted from untrusted sources."""
MAX_CHANNELS = 8  # of an untrusted recording: a header alone may claim a thousand
_MIN_RATE, _MAX_RATE = 1000, 384_000  # Hz, of an untrusted recording
_PIECE = 1 << 16  # frames decoded at once


class AudioTooLongError(AudioError):
    """A recording exceeds the ``max_seconds`` that its reader allows."""


def read(
    source: str | Path | bytes | BinaryIO,
    *,
    max_seconds: float | None = None,
    trusted: bool = True,
) -> tuple[Tensor, int]:
    """Decode a recording and mix it down to mono.

    WAV, FLAC, OGG and MP3 are decoded by soundfile; m4a, webm and others by PyAV
    (``pip install 'diffa-audio[audio]'``).

    Args:
        source: a path, the bytes of a file, or a binary file object.
        max_seconds: longest recording. Default: any length.
        trusted: False for data from a network: accept only ``FORMATS``, ``MAX_CHANNELS`` channels
            and ordinary sample rates, and keep FFmpeg out.

    Returns:
        The waveform (S,), float32, and its samples per second.

    Raises:
        AudioTooLongError: the recording is longer than ``max_seconds``.
        AudioError: it is missing, empty, damaged, or not audio.
    """
    file, name = _open(source)
    if not trusted and not _has_known_header(file):
        raise AudioError(f"{name} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file")
    import soundfile

    try:
        waveform, rate = _decode_soundfile(file, name, max_seconds, trusted=trusted)
    except AudioError:
        raise
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        if not trusted:
            raise AudioError(f"{name} cannot be decoded: {error}") from error
        waveform, rate = _decode_pyav(file, name, max_seconds)
    if waveform.numel() == 0:
        raise AudioError(f"{name} holds no samples")
    return waveform, rate


def _open(source: str | Path | bytes | BinaryIO) -> tuple[Path | BinaryIO, str]:
    """Return what the decoders open, and its name in errors."""
    if isinstance(source, bytes):
        return io.BytesIO(source), f"the recording of {len(source)} bytes"
    if not isinstance(source, str | Path):
        return source, str(getattr(source, "name", "the recording"))
    path = Path(source).expanduser()
    if not path.exists():
        raise AudioError(f"there is no file {path}")
    if path.is_dir():
        raise AudioError(f"{path} is a folder: give one recording")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is an empty file")
    return path, str(path)


def _has_known_header(file: Path | BinaryIO) -> bool:
    """Whether the first bytes are those of one of ``FORMATS``; libsndfile opens many more."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            head = stream.read(4)
    else:
        head = file.read(4)
        file.seek(0)
    mpeg_frame = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return head in (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS") or head[:3] == b"ID3" or mpeg_frame


def _decode_soundfile(
    file: Path | BinaryIO, name: str, max_seconds: float | None, *, trusted: bool
) -> tuple[Tensor, int]:
    import soundfile

    with soundfile.SoundFile(file) as sound:
        rate, channels = int(sound.samplerate), int(sound.channels)
        if not trusted and not 1 <= channels <= MAX_CHANNELS:
            raise AudioError(f"{name} has {channels} channels: mix them down to {MAX_CHANNELS}")
        if not trusted and not _MIN_RATE <= rate <= _MAX_RATE:
            raise AudioError(f"{name} has {rate} samples per second: resample it to 16000")

        def pieces() -> Iterator[Tensor]:
            while len(piece := sound.read(_PIECE, dtype="float32", always_2d=True)):
                yield torch.from_numpy(piece).T

        return _mix_down(pieces(), rate, name, max_seconds), rate


def _decode_pyav(file: Path | BinaryIO, name: str, max_seconds: float | None) -> tuple[Tensor, int]:
    try:
        av: Any = import_module("av")
    except ImportError as error:
        raise AudioError(
            f"{name} cannot be read as WAV, FLAC, OGG or MP3: it is damaged, not audio, or in "
            "another format (m4a, webm, ...) that pip install 'diffa-audio[audio]' adds"
        ) from error
    if not isinstance(file, Path):
        file.seek(0)
    try:
        with av.open(str(file) if isinstance(file, Path) else file) as container:
            stream = container.streams.audio[0]
            frames = (_planar(frame) for frame in container.decode(stream))
            return _mix_down(frames, int(stream.rate), name, max_seconds), int(stream.rate)
    except (av.error.FFmpegError, IndexError) as error:
        raise AudioError(f"{name} holds no audio that can be decoded: {error}") from error


def _mix_down(pieces: Iterable[Tensor], rate: int, name: str, max_seconds: float | None) -> Tensor:
    """Average the channels of pieces (channels, S), until they are too long."""
    # Headers may lie about the length, so samples are counted as they are decoded.
    mono, count = [torch.empty(0)], 0
    for piece in pieces:
        count += piece.shape[1]
        if max_seconds is not None and count > int(max_seconds * rate):
            raise AudioTooLongError(f"{name} is longer than {max_seconds:g} s")
        mono.append(piece.mean(0))
    return torch.cat(mono)


def _planar(frame: Any) -> Tensor:
    """Return one frame of PyAV as floats (channels, S); integer formats are scaled to [-1, 1]."""
    samples = torch.from_numpy(frame.to_ndarray())
    if not frame.format.is_planar:
        samples = samples.view(-1, len(frame.layout.channels)).T
    if samples.dtype == torch.uint8:
        return (samples.float() - 128) / 128
    scale = 1.0 if samples.is_floating_point() else float(torch.iinfo(samples.dtype).max) + 1
    return samples.float() / scale


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
            samples = samples.to(torch.float32).mean(0 if len(samples) < samples.shape[1] else 1)
        return prepare(samples, rate), rate
    stored = fields.get("bytes") or fields.get("path") or value
    if isinstance(stored, bytes):
        return read(stored)
    if not isinstance(stored, str | Path) or not str(stored):
        raise AudioError(
            f"a recording must be a path, bytes or samples, not {type(value).__name__}"
        )
    return read((folder or Path()) / Path(stored).expanduser())


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
        waveform, file_rate = read(audio)
        _check_finite(waveform, str(audio))
        return resample(waveform, file_rate, rate)
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
