"""The front ends that published encoders were trained behind, each on the waveform's device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffa.errors import PluginError


class Bank(NamedTuple):
    """Triangular mel filters, as torchaudio draws them.

    Attributes:
        bins: filters.
        fft: samples of the transform.
        rate: samples per second.
        low: where the first filter begins, in Hz.
        high: where the last one ends, in Hz.
        scale: ``htk`` or ``slaney``; the latter's filters have equal area.
    """

    bins: int
    fft: int
    rate: int
    low: float
    high: float
    scale: str


def torchaudio() -> Any:
    """Import torchaudio; PluginError with the way out where it does not load."""
    try:
        import torchaudio as library
        import torchaudio.compliance.kaldi
        import torchaudio.functional
    except Exception as error:  # a wheel for another torch raises OSError or RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PluginError(
            f"torchaudio does not load beside torch {torch.__version__} ({reason}): install the "
            "release made for it; `diffa doctor` says which"
        ) from error
    return library


def kaldi(wave: Tensor, *, bins: int, rate: int, window: str, hop: int = 160) -> Tensor:
    """Return Kaldi's log filter banks (T, bins) of a wave (S,), 25 ms windows from 20 Hz up.

    T is 1 + (S - 25 ms) // hop: windows lie inside the wave. Float32 also under autocast.
    """
    fbank = torchaudio().compliance.kaldi.fbank
    with torch.autocast(wave.device.type, enabled=False):
        bank: Tensor = fbank(
            wave.float()[None],
            num_mel_bins=bins,
            sample_frequency=rate,
            window_type=window,
            frame_shift=1000 * hop / rate,
            dither=0.0,
        )
    return bank


def power_mel(
    waves: Tensor, bank: Bank, *, hop: int, win: int, symmetric: bool, mode: str
) -> Tensor:
    """Return mel energies (M, T, bins) of waves (M, S), frames centred on multiples of ``hop``.

    ``win`` samples of a Hann window, ``symmetric`` or periodic; ``mode`` says how the ends are
    padded (``constant`` or ``reflect``). Float32 also under autocast.
    """
    filters = _filters(bank, waves.device)
    with torch.autocast(waves.device.type, enabled=False):
        spectrum = torch.stft(
            waves.float(),
            bank.fft,
            hop,
            win,
            window=torch.hann_window(win, periodic=not symmetric, device=waves.device),
            pad_mode=mode,
            return_complex=True,
        )
        return spectrum.abs().square().transpose(1, 2) @ filters


def emphasise(waves: Tensor, factor: float) -> Tensor:
    """Subtract ``factor`` of the sample before from every sample (M, S) but the first."""
    return waves - factor * pad(waves[:, :-1], (1, 0))


def levelled(waves: Tensor, sizes: list[int]) -> Tensor:
    """Give each wave (M, S) zero mean and unit variance over its true samples, zeros after."""
    there = inside(sizes, waves)
    count = there.sum(dim=1, keepdim=True)
    mean = torch.where(there, waves, 0).sum(dim=1, keepdim=True) / count
    centred = torch.where(there, waves - mean, 0)
    return centred / (centred.square().sum(dim=1, keepdim=True) / count + 1e-7).sqrt()


def inside(sizes: list[int], like: Tensor) -> Tensor:
    """Return which places of (M, S, ...) lie within each row's size, (M, S) bool."""
    ends = torch.tensor(sizes, device=like.device)
    return torch.arange(like.shape[1], device=like.device) < ends[:, None]


@lru_cache(maxsize=16)
def _filters(bank: Bank, device: torch.device) -> Tensor:
    """Return filters (fft // 2 + 1, bins); no module's buffer, which bfloat16 would spoil."""
    with torch.inference_mode(False), torch.device("cpu"):
        filters: Tensor = torchaudio().functional.melscale_fbanks(
            bank.fft // 2 + 1,
            bank.low,
            bank.high,
            bank.bins,
            bank.rate,
            norm="slaney" if bank.scale == "slaney" else None,
            mel_scale=bank.scale,
        )
        return filters.to(device)
