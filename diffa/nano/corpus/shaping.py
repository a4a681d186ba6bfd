"""Small operations on waveforms: resampling, trimming, level, tempo."""

import numpy as np
from numpy.typing import NDArray

RATE = 16_000  # samples per second, everywhere in the corpus
Wave = NDArray[np.float32]


def resample(wave: Wave, old: int, new: int) -> Wave:
    """Change the sample rate (band-limited)."""
    if old == new:
        return wave
    import torch
    from torchaudio.functional import resample as convert

    return np.asarray(convert(torch.from_numpy(wave), old, new).numpy(), dtype=np.float32)


def decibels(wave: Wave) -> float:
    """Return the root mean square in dBFS."""
    return float(10 * np.log10(np.mean(np.square(wave, dtype=np.float64)) + 1e-12))


def at_level(wave: Wave, level: float) -> Wave:
    """Scale a waveform to a root mean square of ``level`` dBFS."""
    return np.asarray(wave * 10 ** ((level - decibels(wave)) / 20), dtype=np.float32)


def trim(wave: Wave, below: float = 35.0, hop: int = 160) -> Wave:
    """Cut the ends that are more than ``below`` dB softer than the loudest 10 ms."""
    count = len(wave) // hop
    if count < 4:
        return wave
    power = np.square(wave[: count * hop]).reshape(count, hop).mean(1)
    audible = np.flatnonzero(power > power.max() * 10 ** (-below / 10))
    start, stop = max(audible[0] - 1, 0) * hop, min(audible[-1] + 2, count) * hop
    return fade(wave[start:stop])


def fade(wave: Wave, length: int = 64) -> Wave:
    """Fade both ends, so that joins do not click."""
    length = min(length, len(wave) // 2)
    ramp = np.linspace(0, 1, length, endpoint=False, dtype=np.float32)
    wave = wave.copy()
    wave[:length] *= ramp
    wave[len(wave) - length :] *= ramp[::-1]
    return wave


def stretch(wave: Wave, tempo: float, frame: int = 480, search: int = 120) -> Wave:
    """Change the tempo at the same pitch (waveform-similarity overlap-add)."""
    hop = frame // 2
    if abs(tempo - 1) < 0.02 or len(wave) < 3 * frame:
        return wave
    steps = int((len(wave) - frame - search) / (hop * tempo))
    window = np.hanning(frame + 1)[:frame].astype(np.float32)
    out = np.zeros((steps + 1) * hop + frame, dtype=np.float32)
    at = 0
    for step in range(steps):
        out[step * hop : step * hop + frame] += window * wave[at : at + frame]
        follow = wave[at + hop : at + hop + frame]  # what would continue this frame naturally
        low = max(int((step + 1) * hop * tempo) - search, 0)
        area = wave[low : low + frame + 2 * search]
        if len(area) < frame or len(follow) < frame:
            break
        at = low + int(np.argmax(np.correlate(area, follow, mode="valid")))
    return out[: step * hop + frame]
