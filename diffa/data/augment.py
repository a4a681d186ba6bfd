"""Changes to a waveform that keep what is said: speed, gain, noise and SpecAugment's masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffa.errors import SpecError

_FFT, _HOP = 400, 160  # 25 ms windows every 10 ms at 16 kHz, as Whisper's


class Augment:
    """Alters waveforms (S,); what is drawn follows from each sample's seed alone.

    Args:
        rate: samples per second.
        speed: factors to choose from (0.9, 1.0, 1.1: Kaldi's three-way speed perturbation).
        gain: up to this many dB louder or softer.
        noise: range of signal-to-noise ratios in dB of added white noise; none where empty.
        bands: SpecAugment's frequency masks, each up to ``band`` of the spectrum wide.
        gaps: SpecAugment's time masks, each up to ``gap`` seconds long.
        share: how many of the samples are altered at all.
    """

    def __init__(
        self,
        rate: int,
        *,
        speed: Sequence[float] = (),
        gain: float = 0.0,
        noise: Sequence[float] = (),
        bands: int = 0,
        band: float = 0.15,
        gaps: int = 0,
        gap: float = 0.2,
        share: float = 1.0,
    ) -> None:
        if any(not 0.5 <= factor <= 2.0 for factor in speed):
            raise SpecError(f"speed factors must lie between 0.5 and 2, got {list(speed)}")
        if len(noise) not in (0, 2):
            raise SpecError(f"noise is a range of two ratios in dB, got {list(noise)}")
        if min(gain, bands, band, gaps, gap, share) < 0 or max(share, band) > 1:
            raise SpecError("gain, bands, gaps and gap must be 0 or more, band and share up to 1")
        self.rate, self.speed, self.gain, self.noise = rate, list(speed), gain, list(noise)
        self.bands, self.band, self.gaps, self.gap = bands, band, gaps, gap
        self.share = share

    def __call__(self, waveform: Tensor, seed: int) -> Tensor:
        """Return a waveform (S',) altered as the seed says."""
        rng = torch.Generator().manual_seed(seed)
        if float(torch.rand((), generator=rng)) >= self.share:
            return waveform
        if self.speed:
            factor = self.speed[int(torch.randint(len(self.speed), (), generator=rng))]
            waveform = change_speed(waveform, self.rate, factor)
        if self.gain:
            decibels = self.gain * (2 * float(torch.rand((), generator=rng)) - 1)
            waveform = waveform * 10 ** (decibels / 20)
        if self.noise:
            waveform = self._noisy(waveform, rng)
        if self.bands or self.gaps:
            waveform = self._masked(waveform, rng)
        return waveform

    def _noisy(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        from torchaudio.functional import add_noise

        low, high = self.noise
        ratio = low + (high - low) * torch.rand(1, generator=rng)
        noise = torch.randn(waveform.shape, generator=rng)
        if not bool(waveform.any()):
            return waveform  # against silence no ratio is defined
        return torch.as_tensor(add_noise(waveform[None], noise[None], ratio))[0]

    def _masked(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Mask bands and stretches of the spectrogram (SpecAugment, 1904.08779) and go back."""
        if len(waveform) <= _FFT:
            return waveform
        window = torch.hann_window(_FFT)
        spectrum = torch.stft(waveform, _FFT, _HOP, window=window, return_complex=True)
        bins, frames = spectrum.shape
        for _ in range(self.bands):
            first, last = _span(bins, int(self.band * bins), rng)
            spectrum[first:last] = 0
        for _ in range(self.gaps):
            first, last = _span(frames, int(self.gap * self.rate / _HOP), rng)
            spectrum[:, first:last] = 0
        return torch.istft(spectrum, _FFT, _HOP, window=window, length=len(waveform))


def change_speed(waveform: Tensor, rate: int, factor: float) -> Tensor:
    """Play a waveform (S,) at ``factor`` times its speed; the pitch moves with it."""
    if factor == 1.0:
        return waveform
    from torchaudio.functional import speed

    return torch.as_tensor(speed(waveform, rate, factor)[0])


def _span(size: int, widest: int, rng: torch.Generator) -> tuple[int, int]:
    """Draw a stretch of up to ``widest`` somewhere in ``size``."""
    width = int(torch.randint(min(widest, size) + 1, (), generator=rng))
    first = int(torch.randint(size - width + 1, (), generator=rng))
    return first, first + width
