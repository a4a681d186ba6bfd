"""Decode recordings: the one reader of every command, with one list of formats and one bound."""

from __future__ import annotations

import io
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from diffa.audio.formats import (
    FORMATS,
    MAX_FRAMES,
    MORE_FORMATS,
    find_container,
    find_links,
    find_wav_data,
    finish_flac_header,
    finish_wav_header,
    has_known_header,
    is_cut_ogg,
)
from diffa.audio.resampling import resample
from diffa.errors import AudioError
from diffa.runtime.files import expand

log = logging.getLogger(__name__)
MAX_CHANNELS = 8  # of an untrusted recording: a header alone may claim a thousand
_MIN_RATE, _MAX_RATE = 1000, 384_000  # Hz, of an untrusted recording
# Frames decoded at once. A damaged place in FLAC costs at most one piece; libsndfile seeks between
# pieces, which other formats do not take as well.
_PIECE, _SHORT_PIECE = 1 << 16, 1 << 12
_HEAD = 1 << 16  # bytes in which a WAV file's data chunk begins
_UNKNOWN = 1 << 40  # a header that claims more frames does not know its length
_CANCELLED = 0.01  # energy of a mix of two channels, relative to the channels', that is silence
_LARGEST = 1e10  # of a sample; full scale is 1, files of 32-bit integers read as floats have 2e9


class AudioTooLongError(AudioError):
    """A recording exceeds the length that its reader allows."""


class Header(NamedTuple):
    """What a recording's header says.

    Attributes:
        seconds: Duration; 0 if the header does not say.
        fault: Why the recording cannot be read; empty if nothing is known against it.
    """

    seconds: float = 0.0
    fault: str = ""


class _Bound(NamedTuple):
    name: str
    max_seconds: float | None
    max_frames: int

    def check(self, frames: int, rate: int) -> None:
        """Raise AudioTooLongError for this many frames."""
        if self.max_seconds is not None and frames > int(self.max_seconds * rate):
            raise AudioTooLongError(f"{self.name} is longer than {self.max_seconds:g} s")
        if frames > self.max_frames:
            raise AudioTooLongError(
                f"{self.name} has {frames:,} frames or more, of at most {self.max_frames:,} "
                f"({self.max_frames / rate:.0f} s at {rate} Hz): cut it into parts"
            )


def read(
    source: str | Path | bytes | BinaryIO,
    *,
    max_seconds: float | None = None,
    max_frames: int | None = None,
    trusted: bool = True,
    strict: bool = False,
) -> tuple[Tensor, int]:
    """Decode a recording and mix it down to mono.

    WAV, FLAC, OGG and MP3 are decoded by soundfile, with all links of a chained stream; m4a, webm
    and others by PyAV (``pip install 'diffa-audio[audio]'``). Of a cut or damaged file, what can
    be decoded is returned, and a warning is logged. Channels that cancel each other are not mixed:
    one of them is taken (``mix_down``).

    Args:
        source: A path, the bytes of a file, or a binary file object.
        max_seconds: Longest recording. Default: any length.
        max_frames: Largest number of frames (samples of one channel). Default: the environment's
            DIFFA_MAX_FRAMES, or ``MAX_FRAMES``.
        trusted: False for data from a network: accept only ``FORMATS``, webm and m4a,
            ``MAX_CHANNELS`` channels and ordinary sample rates; FFmpeg gets webm and m4a alone.
        strict: Raise an error for a cut or damaged file.

    Returns:
        The waveform (S,), float32, and its samples per second.

    Raises:
        AudioTooLongError: The recording is longer than ``max_seconds`` or ``max_frames``.
        AudioError: It is missing, empty, damaged, or not audio.
    """
    with _open(source) as (file, data, name):
        container = None if trusted else find_container(bytes(data[:12]))
        if not trusted and container is None and not has_known_header(bytes(data[:4])):
            raise AudioError(f"{name} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file")
        bound = _Bound(name, max_seconds, frame_limit() if max_frames is None else max_frames)
        if container is None:
            mono, damage = _decode(file, data, bound, trusted=trusted)
        else:
            mono, damage = _decode_pyav(file, bound, container)
        waveform = mono.result()
        if waveform.numel() == 0:
            raise AudioError(f"{name} holds no samples" + (f": {damage}" if damage else ""))
        if damage and strict:
            raise AudioError(f"{name} is damaged: {damage}")
        if damage:
            log.warning("%s is damaged: %s; the rest is used", name, damage)
        return waveform, mono.rate


def frame_limit() -> int:
    """Return the environment's bound on frames, or the default."""
    text = os.environ.get("DIFFA_MAX_FRAMES", "")
    if text and not (text.isdecimal() and int(text)):
        raise AudioError(f"DIFFA_MAX_FRAMES must be a number above 0, got {text!r}")
    return int(text) if text else MAX_FRAMES


def probe(source: Path | bytes) -> Header:
    """Return what the header of a recording says, without decoding it."""
    import soundfile

    try:
        with _open(source) as (file, data, name):
            wav = find_wav_data(bytes(data[:_HEAD]), len(data))
            if wav is not None and wav.claimed is not None and wav.claimed > wav.present:
                return Header(0.0, f"is cut: {wav.present} of {wav.claimed} bytes of samples")
            try:
                info = soundfile.info(file)
            except (soundfile.SoundFileError, RuntimeError, TypeError):
                return _probe_pyav(source, file, name)
            if not info.frames and (wav is None or not wav.present):
                return Header(0.0, "holds no samples")
            return Header(info.frames / info.samplerate if info.frames < _UNKNOWN else 0.0)
    except AudioError as error:
        return Header(0.0, str(error))


@contextmanager
def _open(
    source: str | Path | bytes | BinaryIO,
) -> Iterator[tuple[BinaryIO, bytes | mmap.mmap, str]]:
    """Yield a source as a file and as bytes (a path's are mapped, not read), and its name."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), source, f"the recording of {len(source)} bytes"
        return
    if not isinstance(source, str | Path):
        data = source.read()
        name = str(getattr(source, "name", "the recording"))
        if not data:
            raise AudioError(f"{name} is empty")
        yield io.BytesIO(data), data, name
        return
    try:
        path = expand(source)
        if not path.exists():
            raise AudioError(f"there is no file {path}")
        if path.is_dir():
            raise AudioError(f"{path} is a folder: give one recording")
        if path.stat().st_size == 0:
            raise AudioError(f"{path} is an empty file")
        # A file object: to FFmpeg, a name with a colon is an address.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            yield file, mapped, str(path)
    except (OSError, ValueError, RuntimeError) as error:  # names that the system refuses
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{str(source)[:200]!r} cannot be opened: {error}") from error


def mix_down(piece: Tensor) -> tuple[Tensor, bool]:
    """Return the mean of channels (C, S) as (S,), and False; or one channel, and True.

    Channels whose mean has less than 1 % of their energy cancel each other, as where one plug of a
    balanced line is reversed: the first of at least mean energy is taken.
    """
    mix = piece.mean(0)
    if len(piece) > 1:
        energies = piece.double().square().sum(1)
        if mix.double().square().sum() < _CANCELLED * energies.mean():
            return piece[int((energies >= energies.mean()).nonzero()[0, 0])].clone(), True
    return mix, False


class _Mono:
    """The waveform of pieces (channels, S)."""

    def __init__(self, bound: _Bound, rate: int) -> None:
        self.bound, self.rate, self.frames = bound, rate, 0
        self._mix: list[Tensor] = []
        self._cancelled = False

    def add(self, piece: Tensor) -> None:
        """Add decoded samples; raises AudioTooLongError, whatever the header has said."""
        self.frames += piece.shape[1]
        self.bound.check(self.frames, self.rate)
        cancelled = False
        for part in torch.split(piece, _SHORT_PIECE, dim=1):  # channels may cancel for a while only
            mix, silent = mix_down(part)
            self._mix.append(mix)
            cancelled = cancelled or silent
        if cancelled and not self._cancelled:
            self._cancelled = True
            log.warning(
                "%s has channels that cancel each other: one of them is used", self.bound.name
            )

    def join(self, other: _Mono) -> None:
        """Add the next link of a chained stream, which may have a rate of its own."""
        waveform = resample(other.result(), other.rate, self.rate)
        self._mix.append(waveform)
        self.frames += len(waveform)
        self.bound.check(self.frames, self.rate)

    def result(self) -> Tensor:
        """Return the waveform (S,)."""
        mix = torch.cat(self._mix) if self._mix else torch.empty(0)
        check_finite(mix, self.bound.name)
        if mix.numel() and float(mix.abs().max()) > _LARGEST:
            raise AudioError(
                f"{self.bound.name} has samples of size {float(mix.abs().max()):.1e}, where full "
                "scale is 1: it is damaged"
            )
        return mix


def check_finite(waveform: Tensor, what: str) -> None:
    """Raise AudioError for samples that are NaN or infinite; ``what`` names the waveform."""
    bad = (~waveform.isfinite()).nonzero()
    if len(bad):
        raise AudioError(
            f"{what} holds {len(bad)} samples that are NaN or infinite, the first at "
            f"{int(bad[0])}: repair the recording or cut them out"
        )


def _decode(
    file: BinaryIO, data: bytes | mmap.mmap, bound: _Bound, *, trusted: bool
) -> tuple[_Mono, str]:
    """Decode all links of a file; return what is damaged as well."""
    import soundfile

    wav = find_wav_data(bytes(data[:_HEAD]), len(data))
    damage = ""
    if wav is not None and wav.claimed is None:
        bound.check(wav.present // wav.frame, _MAX_RATE)
        file = io.BytesIO(finish_wav_header(bytes(data), wav))
    elif wav is not None and wav.claimed is not None and wav.claimed > wav.present:
        damage = f"it is cut, {wav.present} of {wav.claimed} bytes of samples are there"
    links = [0]
    if wav is None:
        links = find_links(data)
        damage = "it is cut, its last page is missing" if is_cut_ogg(data) else ""
        if len(links) == 1 and (whole_flac := finish_flac_header(data)) is not None:
            file = io.BytesIO(whole_flac)
    try:
        if len(links) == 1:
            mono, fault = _decode_soundfile(file, bound, trusted=trusted)
            if fault and trusted:
                mono, fault = _decode_more(file, bound, mono, fault)
            return mono, fault or damage
        ends = [*links[1:], len(data)]
        whole: _Mono | None = None
        for start, end in zip(links, ends, strict=True):
            part = io.BytesIO(data[start:end])
            mono, fault = _decode_soundfile(part, bound, trusted=trusted)
            damage = damage or fault
            if whole is None:
                whole = mono
            else:
                whole.join(mono)
        assert whole is not None
        return whole, damage
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        if not trusted:
            # libsndfile's own words: soundfile's name the file object
            words: object = getattr(error, "error_string", None) or error
            raise AudioError(f"{bound.name} cannot be decoded: {words}") from error
    file.seek(0)
    return _decode_pyav(file, bound)


def _decode_soundfile(file: BinaryIO, bound: _Bound, *, trusted: bool) -> tuple[_Mono, str]:
    import soundfile

    with soundfile.SoundFile(file) as sound:
        rate, channels, claimed = int(sound.samplerate), int(sound.channels), int(sound.frames)
        if not trusted:
            _check_ordinary(bound.name, channels, rate)
        if claimed < _UNKNOWN:
            bound.check(claimed, rate)
        mono = _Mono(bound, rate)
        try:
            size = _SHORT_PIECE if sound.format == "FLAC" else _PIECE
            while len(piece := sound.read(size, dtype="float32", always_2d=True)):
                mono.add(torch.from_numpy(piece).T)
        except soundfile.SoundFileError as error:
            if not mono.frames:
                raise
            return mono, f"nothing behind second {mono.frames / rate:.2f} can be decoded ({error})"
    # Lossy formats count a decoder's delay one way or the other.
    missing = claimed - mono.frames - (0 if sound.format in ("WAV", "FLAC") else rate // 10)
    if mono.frames and claimed < _UNKNOWN and missing > 0:
        return mono, (
            f"it is cut, {mono.frames / rate:.2f} of {claimed / rate:.2f} s can be decoded"
        )
    return mono, ""


def _check_ordinary(name: str, channels: int, rate: int) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{name} has {channels} channels: mix them down to {MAX_CHANNELS}")
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise AudioError(f"{name} has {rate} samples per second: resample it to 16000")


def _decode_more(file: BinaryIO, bound: _Bound, mono: _Mono, fault: str) -> tuple[_Mono, str]:
    """Let FFmpeg decode what libsndfile gave up at; keep what is longer."""
    try:
        file.seek(0)
        other, other_fault = _decode_pyav(file, bound)
    except AudioTooLongError:
        raise
    except AudioError:  # PyAV is not installed, or decodes nothing
        return mono, fault
    return (other, other_fault or fault) if other.frames > mono.frames else (mono, fault)


def _import_av(name: str) -> Any:
    try:
        return import_module("av")
    except ImportError as error:
        raise AudioError(
            f"{name} cannot be read as WAV, FLAC, OGG or MP3: it is damaged, not audio, or in "
            "another format (m4a, webm, ...) that pip install 'diffa-audio[audio]' adds"
        ) from error


def _decode_pyav(
    file: BinaryIO, bound: _Bound, container_format: str | None = None
) -> tuple[_Mono, str]:
    """Decode packet by packet: a damaged one costs its own samples.

    A format is given for untrusted data.
    """
    av = _import_av(bound.name)
    lost = 0
    try:
        with av.open(file, format=container_format) as container:
            stream = container.streams.audio[0]
            if container_format is not None:
                _check_ordinary(bound.name, int(stream.channels), int(stream.rate))
            mono = _Mono(bound, int(stream.rate))
            claimed = float(stream.duration * stream.time_base) if stream.duration else 0.0
            bound.check(int(claimed * mono.rate), mono.rate)
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    break
                except av.error.FFmpegError:
                    lost += 1
                    break
                try:
                    for frame in packet.decode():
                        mono.add(_planar(frame))
                except av.error.FFmpegError:
                    lost += 1
    except (av.error.FFmpegError, IndexError) as error:
        raise AudioError(f"{bound.name} holds no audio that can be decoded: {error}") from error
    if not mono.frames:
        raise AudioError(f"{bound.name} holds no audio that can be decoded")
    seconds = mono.frames / mono.rate
    if lost:
        return mono, f"{lost} packets cannot be decoded, {seconds:.2f} s can"
    if claimed - seconds > max(0.2, 0.01 * claimed):
        return mono, f"it is cut, {seconds:.2f} of {claimed:.2f} s can be decoded"
    return mono, ""


def _probe_pyav(source: Path | bytes, file: BinaryIO, name: str) -> Header:
    if isinstance(source, bytes) or source.suffix.lower()[1:] not in MORE_FORMATS:
        try:
            _import_av(name)
        except AudioError:
            return Header(0.0, f"audio file {name} is not readable audio")
    try:
        av = _import_av(name)
        file.seek(0)
        with av.open(file) as container:
            stream = container.streams.audio[0]
            return Header(float(stream.duration * stream.time_base) if stream.duration else 0.0)
    except AudioError as error:
        return Header(0.0, str(error))
    except Exception as error:  # FFmpeg's errors, and files without sound
        return Header(0.0, f"audio file {name} is not readable audio: {error}")


def _planar(frame: Any) -> Tensor:
    """Return one frame of PyAV as floats (channels, S); integer formats are scaled to [-1, 1]."""
    samples = torch.from_numpy(frame.to_ndarray())
    if not frame.format.is_planar:
        samples = samples.view(-1, len(frame.layout.channels)).T
    if samples.dtype == torch.uint8:
        return (samples.float() - 128) / 128
    scale = 1.0 if samples.is_floating_point() else float(torch.iinfo(samples.dtype).max) + 1
    return samples.float() / scale
