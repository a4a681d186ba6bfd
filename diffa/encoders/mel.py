"""Whisper's log-mel features, from the waveform, on the waveform's device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class LogMelConfig(NamedTuple):
    """Settings of a log-mel front end; the defaults are Whisper's.

    Attributes:
        num_mel_bins: mel filters.
        n_fft: samples of one Fourier transform.
        hop_length: samples from frame to frame.
        sampling_rate: samples per second.
    """

    num_mel_bins: int = 80
    n_fft: int = 400
    hop_length: int = 160
    sampling_rate: int = 16000


def log_mel(audio: Tensor, mel: LogMelConfig) -> Tensor:
    """Return Whisper's features (M, bins, S // hop_length) of audio (M, S).

    The log10 power is clipped at 8 below each row's maximum, then scaled: x / 4 + 1 (as in
    transformers' WhisperFeatureExtractor). Always float32, also under autocast: the logarithm of
    half-precision power is noise.
    """
    with torch.autocast(audio.device.type, enabled=False):
        window, filters = _constants(mel, audio.device)
        spectrum = torch.stft(
            audio.float(), mel.n_fft, mel.hop_length, window=window, return_complex=True
        )
        real, imaginary = torch.view_as_real(spectrum[..., :-1]).unbind(-1)
        power = real.square().add_(imaginary.square())  # six times as fast as .sum(-1)
        features = (filters @ power).clamp(min=1e-10).log10()
        # Rows must not share their peak: a row's features would depend on its batch.
        peak = features.amax(dim=(1, 2), keepdim=True)
        return torch.maximum(features, peak - 8) / 4 + 1


@lru_cache(maxsize=16)
def _constants(mel: LogMelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the Hann window (n_fft,) and the filters (bins, n_fft // 2 + 1).

    They are no module buffers, because a module that moves to bfloat16 would cast them.
    """
    with torch.inference_mode(False):
        window = torch.hann_window(mel.n_fft, device=device)
        return window, mel_filters(mel).to(device)


def mel_filters(mel: LogMelConfig) -> Tensor:
    """Return triangular filters (bins, n_fft // 2 + 1) of equal area on Slaney's scale, to 8 kHz.

    Computed here because transformers' audio helpers do not import with a mismatched torchaudio.
    """
    top = _to_mel(8000.0)
    marks = [_to_hertz(top * i / (mel.num_mel_bins + 1)) for i in range(mel.num_mel_bins + 2)]
    edges = torch.tensor(marks, dtype=torch.float64, device="cpu")
    bands = mel.n_fft // 2 + 1
    hertz = torch.linspace(0, mel.sampling_rate // 2, bands, dtype=torch.float64, device="cpu")
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
