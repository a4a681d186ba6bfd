"""A recording as pictures: its waveform and its mel spectrogram on one axis of time."""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from typing import TYPE_CHECKING

from diffa.errors import AudioError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SECONDS = 300.0
"""Longest recording that the page accepts; a picture of more has no detail."""
_RATE, _COLUMNS, _ROWS = 16_000, 800, 80
_WIDE, _WAVE, _MEL, _AXIS = 800, 90, 160, 24
_INKS = ((10, 10, 35), (72, 30, 110), (160, 50, 110), (230, 100, 70), (252, 190, 90))


def load_recording(path: str | None, rate: int) -> Tensor:
    """Return the waveform (S,) of an upload at ``rate``; raises AudioError."""
    from diffa.audio import AudioTooLongError, prepare, read, resample

    if not path:
        raise AudioError(
            "there is no recording yet: upload a file, use the microphone or choose an example"
        )
    try:
        waveform, file_rate = read(path, max_seconds=MAX_SECONDS, trusted=False)
        return resample(prepare(waveform, file_rate), file_rate, rate)
    except AudioTooLongError as error:
        raise AudioError(
            f"the recording is longer than the {MAX_SECONDS:.0f} s that this page accepts: "
            "cut it, or use `diffa ask`"
        ) from error
    except AudioError as error:  # the upload's path is long, and means nothing to the visitor
        raise AudioError(str(error).replace(path, "this file")) from error


def picture(wave: Tensor, rate: int) -> str:
    """Draw a waveform (S,) and its mel spectrogram as one SVG."""
    seconds = len(wave) / rate
    high = _WAVE + _MEL + _AXIS
    return (
        f'<svg class="d-sound" role="img" viewBox="0 0 {_WIDE} {high}" '
        f'aria-label="Waveform and mel spectrogram of {seconds:.1f} seconds">'
        f'<path d="{_outline(wave)}" fill="currentColor"/>'
        f'<image x="0" y="{_WAVE}" width="{_WIDE}" height="{_MEL}" preserveAspectRatio="none" '
        f'href="{_spectrogram(wave, rate)}"/>{_axis(seconds, high)}</svg>'
    )


def _outline(wave: Tensor) -> str:
    """The highest and lowest sample of every column, as a closed path."""
    import torch

    edges = torch.linspace(0, len(wave), _COLUMNS + 1).long()
    pieces = [wave[a : max(int(b), int(a) + 1)] for a, b in pairwise(edges)]
    middle, scale = _WAVE / 2, _WAVE / 2 - 4
    scale /= max(float(wave.abs().max()), 1e-6)
    tops = [f"{x},{middle - float(p.max()) * scale - 0.4:.1f}" for x, p in enumerate(pieces)]
    lows = [f"{x},{middle - float(p.min()) * scale + 0.4:.1f}" for x, p in enumerate(pieces)]
    return f"M{'L'.join([*tops, *reversed(lows)])}Z"


def _spectrogram(wave: Tensor, rate: int) -> str:
    """Log-mel energies as the address of a PNG, low frequencies at the bottom."""
    import torch
    from PIL import Image

    from diffa.audio import resample
    from diffa.encoders.mel import LogMelConfig, log_mel

    audio = resample(wave, rate, _RATE)
    short = max(0, 2 * LogMelConfig().hop_length - len(audio))
    audio = torch.nn.functional.pad(audio, (0, short))
    mel = log_mel(audio[None], LogMelConfig(num_mel_bins=_ROWS))
    mel = torch.nn.functional.adaptive_max_pool1d(mel, min(_COLUMNS, mel.shape[2]))[0].flip(0)
    mel = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-6)
    ink = torch.tensor(_INKS, dtype=torch.float32)
    place = mel * (len(ink) - 1)
    low = place.floor().long().clamp(max=len(ink) - 2)
    colours = torch.lerp(ink[low], ink[low + 1], (place - low)[..., None])
    buffer = io.BytesIO()
    Image.fromarray(colours.round().to(torch.uint8).numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _axis(seconds: float, high: int) -> str:
    """Ticks at whole numbers of seconds, six at most."""
    every = next((n for n in (0.25, 0.5, 1, 2, 5, 10, 20, 30, 60) if seconds / n <= 8), 120)
    ticks = ""
    for number in range(int(seconds / every) + 1):
        x = number * every / max(seconds, 1e-6) * _WIDE
        anchor = "start" if x < 20 else "end" if x > _WIDE - 30 else "middle"
        ticks += (
            f'<text x="{x:.0f}" y="{high - 6}" text-anchor="{anchor}">{number * every:g} s</text>'
        )
    return ticks
