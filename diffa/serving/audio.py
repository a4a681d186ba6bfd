"""Recordings that arrive as bytes: decoded piece by piece, never beyond what the server takes."""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import Any

import torch
from torch import Tensor

from diffa.audio import prepare, resample
from diffa.errors import AudioError
from diffa.serving.errors import bad, too_large
from diffa.serving.limits import Limits

FORMATS = ("wav", "mp3", "flac", "ogg")
CHANNELS = 8
_PIECE = 1 << 16  # frames decoded at once
_KERNEL = 1 << 22  # elements of the resampler's filter: rates without a common divisor need more


def from_base64(text: object, param: str, limits: Limits) -> bytes:
    """Decode base64 or a ``data:`` URI; raises Refusal (400, 413)."""
    if not isinstance(text, str):
        raise bad(f"{param} must be base64 text, got {type(text).__name__}", param)
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise bad(f"{param}: a data URI must be 'data:audio/...;base64,...'", param)
    if len(text) > limits.bytes * 4 // 3 + 4:
        raise too_large(f"{param} is longer than {limits.bytes} bytes", param)
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise bad(f"{param} is not base64: {error}", param) from error
    if not data:
        raise bad(f"{param} is empty", param)
    return data


def known(data: bytes) -> bool:
    """Whether the first bytes are those of a WAV, FLAC, OGG or MP3 file."""
    head = data[:4]
    frame = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return head in (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS") or head[:3] == b"ID3" or frame


def decode(data: bytes, rate: int, limits: Limits, param: str) -> Tensor:
    """Waveform (S,) at ``rate`` of a file's bytes.

    Raises:
        Refusal: not audio, damaged, not finite (400), or longer than the server takes (413).
    """
    if not known(data):
        raise bad(f"{param} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file", param)
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            found, channels = int(file.samplerate), int(file.channels)
            _check_shape(found, channels, rate, param)
            samples = _pieces(file, int(limits.audio * found), limits, param)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        raise bad(f"{param} cannot be decoded: {error}", param) from error
    try:
        return resample(prepare(samples, found), found, rate)
    except AudioError as error:
        raise bad(f"{param}: {error}", param) from error


def _check_shape(found: int, channels: int, rate: int, param: str) -> None:
    """Refuse what would take far more memory than the recording itself."""
    if not 1 <= channels <= CHANNELS:
        raise bad(f"{param} has {channels} channels; at most {CHANNELS} are taken", param)
    common = math.gcd(found, rate)
    if not 1000 <= found <= 384000 or (found // common) * (rate // common) > _KERNEL:
        raise bad(
            f"{param} has {found} samples per second: use a common rate such as 16000, 22050, "
            "44100 or 48000",
            param,
        )


def _pieces(file: Any, most: int, limits: Limits, param: str) -> Tensor:
    """Mono samples (S,), decoded until they are too many: a header may lie."""
    pieces, count = [], 0
    while len(piece := file.read(_PIECE, dtype="float32", always_2d=True)):
        count += len(piece)
        if count > most:
            raise too_large(f"{param} is longer than {limits.audio:g} s", param)
        pieces.append(torch.from_numpy(piece.mean(axis=1)))
    if not pieces:
        raise bad(f"{param} holds no samples", param)
    return torch.cat(pieces)
