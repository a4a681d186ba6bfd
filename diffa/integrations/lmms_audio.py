"""Recordings of lmms-eval's documents as one waveform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffa.audio import prepare, read_dataset_audio, resample

_PAUSE_SECONDS = 0.5  # of silence between two recordings


def load_recording(value: Any, rate: int) -> Tensor:
    """Return a recording in any form of a data set (``read_dataset_audio``), (S,) at ``rate``.

    Raises:
        AudioError: another form, or a recording that cannot be read.
    """
    waveform, file_rate = read_dataset_audio(value)
    return prepare(resample(waveform, file_rate, rate), rate)


def concatenate_recordings(waveforms: Sequence[Tensor], rate: int) -> Tensor | None:
    """Return recordings one after the other with pauses between; None where there are none."""
    if not waveforms:
        return None
    pause = torch.zeros(int(_PAUSE_SECONDS * rate))
    pieces = [piece for waveform in waveforms for piece in (waveform, pause)]
    return torch.cat(pieces[:-1])
