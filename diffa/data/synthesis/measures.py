"""Pitch, volume and speaking rate of a recording, measured from its signal."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffa.errors import AudioError

Array = NDArray[np.float64]
RATE = 16_000
_HOP = 160  # 10 ms
_HALF = RATE // 2  # pitch is found at 8 kHz: half the samples, half the lags
_LOWEST, _HIGHEST = 60.0, 420.0  # Hz, of voices
_WINDOW = 320  # 40 ms at 8 kHz: two periods and a half of the lowest voice
_RANGE = 30.0  # dB below the loud frames that still count as sounding
_FLOOR = -65.0  # dBFS; what is softer is silence whatever surrounds it
_VOICED = 0.55  # of the normalised correlation at the best lag
_DIP = 2.0  # dB between two syllables (de Jong and Wempe, 2009)


class Measures(NamedTuple):
    """What the signal says.

    Attributes:
        duration: seconds.
        pitch: median of the voiced frames in Hz; None where too few are voiced.
        level: root mean square of what sounds, in dB below full scale; None for silence.
        rate: syllables per second from the first sound to the last; None without any.
    """

    duration: float
    pitch: float | None
    level: float | None
    rate: float | None


def measure_speech(wave: NDArray[np.floating], rate: int = RATE) -> Measures:
    """Measure a waveform (S,) of floats at 16 kHz; raises AudioError for another rate or shape."""
    if rate != RATE or wave.ndim != 1 or not len(wave):
        raise AudioError(
            f"a waveform (S,) at {RATE} Hz is measured, not {wave.shape} at {rate}: "
            "diffa.audio.prepare(path, 16000) reads one"
        )
    samples = wave.astype(np.float64)
    levels = _levels(samples)
    sounding = levels > max(float(np.percentile(levels, 95)) - _RANGE, _FLOOR)
    if not sounding.any():
        return Measures(len(samples) / rate, None, None, None)
    pitches = _pitches(samples, sounding)
    voiced = ~np.isnan(pitches)
    power = np.mean(10 ** (levels[sounding] / 10))
    return Measures(
        len(samples) / rate,
        float(np.median(pitches[voiced])) if voiced.sum() >= 5 else None,
        float(10 * np.log10(power)),
        _syllable_rate(levels, sounding, voiced),
    )


def _levels(samples: Array) -> Array:
    """Level of a frame of 25 ms every 10 ms, in dBFS, (F,)."""
    energy = np.concatenate([[0.0], np.cumsum(samples**2)])
    starts = np.arange(0, max(len(samples) - 400, 0) + 1, _HOP)
    stops = np.minimum(starts + 400, len(samples))
    return np.asarray(10 * np.log10((energy[stops] - energy[starts]) / (stops - starts) + 1e-12))


def _pitches(samples: Array, sounding: NDArray[np.bool_]) -> Array:
    """Pitch of every sounding frame in Hz, (F,), NaN where it is not voiced.

    Normalised cross-correlation of 40 ms with what follows; of the lags that correlate almost as
    well as the best the shortest is taken, since every multiple of a period correlates too.
    """
    shortest, longest = int(_HALF / _HIGHEST), int(_HALF / _LOWEST)
    halved = samples[: len(samples) // 2 * 2].reshape(-1, 2).mean(axis=1)
    padded = np.concatenate([halved, np.zeros(_WINDOW + longest + 2)]).astype(np.float32)
    places = np.flatnonzero(sounding)
    result = np.full(len(sounding), np.nan)
    for first in range(0, len(places), 2000):  # 20 s at once
        frames = places[first : first + 2000]
        pieces = padded[frames[:, None] * (_HOP // 2) + np.arange(_WINDOW + longest + 1)]
        result[frames] = _periods(pieces, shortest, longest)
    return result


def _periods(pieces: NDArray[np.float32], shortest: int, longest: int) -> Array:
    correlation = _correlation(pieces)[:, : longest + 1]
    inner = correlation[:, shortest : longest + 1]
    best = inner.max(axis=1)
    # a peak is a lag that correlates better than both of its neighbours
    peak = (inner[:, 1:-1] >= inner[:, :-2]) & (inner[:, 1:-1] >= inner[:, 2:])
    good = peak & (inner[:, 1:-1] >= 0.9 * best[:, None])
    lag = shortest + 1 + good.argmax(axis=1)
    rows = np.arange(len(lag))
    left, middle, right = (correlation[rows, lag + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend < 0, 0.5 * (left - right) / np.where(bend < 0, bend, -1.0), 0.0)
    return np.where(good.any(axis=1) & (best > _VOICED), _HALF / (lag + shift), np.nan)


def _correlation(pieces: NDArray[np.float32]) -> Array:
    """Correlation of each row's first 40 ms with the 40 ms that begin at every lag, (F, lags)."""
    lags = pieces.shape[1] - _WINDOW
    size = -(-(pieces.shape[1] + _WINDOW) // 100) * 100  # no power of two: 800 is fast as well
    head = np.fft.rfft(pieces[:, :_WINDOW], size)
    products = np.fft.irfft(np.fft.rfft(pieces, size) * head.conj(), size)[:, :lags]
    squares = np.cumsum(pieces.astype(np.float64) ** 2, axis=1)
    energy = np.concatenate([np.zeros((len(pieces), 1)), squares], axis=1)
    ahead = energy[:, _WINDOW : _WINDOW + lags] - energy[:, :lags]
    return np.asarray(products / np.sqrt(ahead[:, :1] * ahead + 1e-12))


def _syllable_rate(
    levels: Array, sounding: NDArray[np.bool_], voiced: NDArray[np.bool_]
) -> float | None:
    """Peaks of the level that are voiced and lie 2 dB above the dip before them, per second."""
    kernel = np.hanning(9)[1:-1]  # 70 ms: ripples within a vowel are no syllables
    smooth = np.convolve(levels, kernel / kernel.sum(), mode="same")
    count, top, lowest = 0, 0, np.inf
    for index in range(1, len(smooth) - 1):
        lowest = min(lowest, float(smooth[index]))
        if not smooth[index - 1] < smooth[index] >= smooth[index + 1]:
            continue
        if not (sounding[index] and voiced[max(index - 3, 0) : index + 4].any()):
            continue
        if smooth[index] - lowest >= _DIP and (not count or smooth[top] - lowest >= _DIP):
            count, top, lowest = count + 1, index, float(smooth[index])
        elif count and smooth[index] > smooth[top]:
            top, lowest = index, float(smooth[index])  # the same syllable, still rising
    places = np.flatnonzero(sounding)
    return count / float((places[-1] - places[0] + 1) * _HOP / RATE) if count else None
