"""Whisper's log-mel features, from the waveform, on the waveform's device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Mel(NamedTuple):
    """A log-mel front end: mel bins, samples per transform, per hop and per second."""

    bins: int = 80
    fft: int = 400
    hop: int = 160
    rate: int = 16000


def log_mel(audio: Tensor, mel: Mel) -> Tensor:
    """Return features (M, bins, S // hop) of audio (M, S): log10 power in [max - 8, max], / 4 + 1.

    Always float32, also under autocast: the logarithm of half-precision power is noise. Each of
    the M rows is levelled by its own maximum (Whisper, as in WhisperFeatureExtractor).
    """
    with torch.autocast(audio.device.type, enabled=False):
        window, filters = _constants(mel, audio.device)
        spectrum = torch.stft(audio.float(), mel.fft, mel.hop, window=window, return_complex=True)
        real, imaginary = torch.view_as_real(spectrum[..., :-1]).unbind(-1)
        power = real.square().add_(imaginary.square())  # a sum over two takes six times as long
        features = (filters @ power).clamp(min=1e-10).log10()
        peak = features.amax(dim=(1, 2), keepdim=True)
        return torch.maximum(features, peak - 8) / 4 + 1


@lru_cache(maxsize=16)
def _constants(mel: Mel, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the Hann window (fft,) and the filters (bins, fft // 2 + 1); not module buffers,
    because a module that moves to bfloat16 would take them along."""
    with torch.inference_mode(False):
        window = torch.hann_window(mel.fft, device=device)
        return window, mel_filters(mel).to(device)


def mel_filters(mel: Mel) -> Tensor:
    """Return triangular filters (bins, fft // 2 + 1) of equal area on Slaney's mel scale, to 8 kHz.

    Computed here because transformers' audio helpers fail beside a mismatched torchaudio.
    """
    top = _to_mel(8000.0)
    marks = [_to_hertz(top * i / (mel.bins + 1)) for i in range(mel.bins + 2)]
    edges = torch.tensor(marks, dtype=torch.float64, device="cpu")
    bands = mel.fft // 2 + 1
    hertz = torch.linspace(0, mel.rate // 2, bands, dtype=torch.float64, device="cpu")
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (hertz - left) / (centre - left)
    falling = (right - hertz) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2 / (right - left))).float()


# Slaney's scale: linear below 1 kHz (15 mels), then 27 logarithmic steps for a factor of 6.4
_KNEE_HERTZ, _KNEE_MEL = 1000.0, 15.0
_STEP = math.log(6.4) / 27


def _to_mel(hertz: float) -> float:
    if hertz < _KNEE_HERTZ:
        return hertz * _KNEE_MEL / _KNEE_HERTZ
    return _KNEE_MEL + math.log(hertz / _KNEE_HERTZ) / _STEP


def _to_hertz(mel: float) -> float:
    if mel < _KNEE_MEL:
        return mel * _KNEE_HERTZ / _KNEE_MEL
    return _KNEE_HERTZ * math.exp(_STEP * (mel - _KNEE_MEL))
