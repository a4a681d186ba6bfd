"""Decode the recordings of requests: bounded in bytes, seconds and memory."""

from __future__ import annotations

import base64
import binascii
import math
from typing import NamedTuple

from torch import Tensor

from diffa.audio import AudioTooLongError, prepare, probe, read, resample
from diffa.audio.formats import has_known_header
from diffa.errors import AudioError
from diffa.serving.errors import bad_request, too_large
from diffa.serving.limits import Limits

# Elements of the resampling filter: two rates without a common divisor need gigabytes.
_MAX_FILTER = 1 << 22


class SentRecording(NamedTuple):
    """Bytes of an audio file, and the field of the request that holds them."""

    data: bytes
    param: str


def decode_base64(text: str, param: str, limits: Limits) -> SentRecording:
    """Decode base64 or a ``data:`` URI; raises RequestError (400, 413)."""
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise bad_request(f"{param}: a data URI must be 'data:audio/...;base64,...'", param)
    if len(text) > limits.max_body_bytes * 3 // 2:
        raise too_large(f"{param} is longer than {limits.max_body_bytes} bytes", param)
    try:
        letters = text.encode("ascii").translate(None, b" \t\r\n")  # MIME breaks lines
        data = base64.b64decode(letters, validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise bad_request(f"{param} is not base64: {error}", param) from error
    if not data:
        raise bad_request(f"{param} is empty", param)
    return SentRecording(data, param)


def probe_seconds(data: bytes) -> float:
    """Return the seconds that a file's header claims; 0 if it does not say."""
    return probe(data).seconds if has_known_header(data[:4]) else 0.0


def decode_recording(recording: SentRecording, rate: int, limits: Limits) -> Tensor:
    """Return the waveform (S,) of a file's bytes at ``rate`` samples per second.

    Raises:
        RequestError: not audio, damaged, not finite (400), or too long (413).
    """
    data, param = recording
    try:
        waveform, file_rate = read(data, max_seconds=limits.max_audio_seconds, trusted=False)
        common = math.gcd(file_rate, rate)
        if (file_rate // common) * (rate // common) > _MAX_FILTER:
            raise AudioError(
                f"{file_rate} samples per second cannot be resampled cheaply: use a common rate "
                "such as 16000, 22050, 44100 or 48000"
            )
        return resample(prepare(waveform, file_rate), file_rate, rate)
    except AudioTooLongError as error:
        raise too_large(str(error), param) from error
    except AudioError as error:
        raise bad_request(str(error), param) from error
