"""Recordings: decode, mix down, resample, validate, write, and pad a batch."""

from diffa.audio.decode import (
    MAX_CHANNELS,
    AudioTooLongError,
    Header,
    probe,
    read,
)
from diffa.audio.formats import FORMATS, MAX_FRAMES, MORE_FORMATS
from diffa.audio.resampling import resample
from diffa.audio.waveforms import (
    as_batch,
    pad,
    prepare,
    read_dataset_audio,
    samples_of,
    write_wav,
)

__all__ = [
    "FORMATS",
    "MAX_CHANNELS",
    "MAX_FRAMES",
    "MORE_FORMATS",
    "AudioTooLongError",
    "Header",
    "as_batch",
    "pad",
    "prepare",
    "probe",
    "read",
    "read_dataset_audio",
    "resample",
    "samples_of",
    "write_wav",
]
