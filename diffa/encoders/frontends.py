"""The front ends that published encoders were trained with, on the waveform's device."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffa.encoders.windows import length_mask
from diffa.errors import PluginError
from diffa.types import FeatureSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class MelFilterBank(NamedTuple):
    """Triangular mel filters, as torchaudio computes them.

    Attributes:
        num_mel_bins: filters.
        n_fft: samples of one Fourier transform.
        sampling_rate: samples per second.
        f_min: start of the first filter, in Hz.
        f_max: end of the last filter, in Hz.
        mel_scale: ``htk`` or ``slaney``; filters on Slaney's scale have equal area.
    """

    num_mel_bins: int
    n_fft: int
    sampling_rate: int
    f_min: float
    f_max: float
    mel_scale: str


def feature_spec(config: PretrainedConfig, rate: float) -> FeatureSpec:
    """Return the shape of a transformers encoder's output at ``rate`` frames per second."""
    width, layers = config.hidden_size, config.num_hidden_layers
    return FeatureSpec(width, layers, rate, config.num_attention_heads)


def import_torchaudio() -> Any:
    """Return torchaudio.

    Raises:
        PluginError: it does not load with the installed torch.
    """
    try:
        import torchaudio
        import torchaudio.compliance.kaldi
        import torchaudio.functional
    except Exception as error:  # a wheel for another torch raises OSError or RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PluginError(
            f"torchaudio does not load beside torch {torch.__version__} ({reason}): install the "
            "release made for it; `diffa doctor` says which"
        ) from error
    return torchaudio


def kaldi_fbank(
    wave: Tensor, *, num_mel_bins: int, sampling_rate: int, window_type: str, hop_length: int = 160
) -> Tensor:
    """Return Kaldi's log filter banks (T, bins) of a wave (S,), 25 ms windows from 20 Hz up.

    T is 1 + (S - 25 ms) // hop: windows lie inside the wave. Float32 also under autocast.
    """
    fbank = import_torchaudio().compliance.kaldi.fbank
    with torch.autocast(wave.device.type, enabled=False):
        energies: Tensor = fbank(
            wave.float()[None],
            num_mel_bins=num_mel_bins,
            sample_frequency=sampling_rate,
            window_type=window_type,
            frame_shift=1000 * hop_length / sampling_rate,
            dither=0.0,
        )
    return energies


def mel_spectrogram(
    waves: Tensor,
    bank: MelFilterBank,
    *,
    hop_length: int,
    win_length: int,
    periodic: bool,
    pad_mode: str,
) -> Tensor:
    """Return mel energies (M, T, bins) of waves (M, S), frames centred on multiples of the hop.

    Float32 also under autocast.

    Args:
        waves: samples.
        bank: mel filters.
        hop_length: samples from frame to frame.
        win_length: samples of the Hann window.
        periodic: whether the window is periodic, else symmetric.
        pad_mode: padding of both ends, ``constant`` or ``reflect``.
    """
    filters = _mel_filters(bank, waves.device)
    with torch.autocast(waves.device.type, enabled=False):
        spectrum = torch.stft(
            waves.float(),
            bank.n_fft,
            hop_length,
            win_length,
            window=torch.hann_window(win_length, periodic=periodic, device=waves.device),
            pad_mode=pad_mode,
            return_complex=True,
        )
        return spectrum.abs().square().transpose(1, 2) @ filters


def preemphasis(waves: Tensor, factor: float) -> Tensor:
    """Subtract ``factor`` times the previous sample from every sample of waves (M, S)."""
    return waves - factor * pad(waves[:, :-1], (1, 0))


def normalise_waves(waves: Tensor, sizes: list[int]) -> Tensor:
    """Scale each wave (M, S) to zero mean and unit variance over its true samples, zeros after."""
    inside = length_mask(sizes, waves)
    count = inside.sum(dim=1, keepdim=True)
    mean = torch.where(inside, waves, 0).sum(dim=1, keepdim=True) / count
    centred = torch.where(inside, waves - mean, 0)
    return centred / (centred.square().sum(dim=1, keepdim=True) / count + 1e-7).sqrt()


@lru_cache(maxsize=16)
def _mel_filters(bank: MelFilterBank, device: torch.device) -> Tensor:
    """Return filters (n_fft // 2 + 1, bins); not a buffer, which bfloat16 would cast."""
    # Built on the CPU outside inference mode: a cached tensor may be used anywhere later.
    with torch.inference_mode(False), torch.device("cpu"):
        filters: Tensor = import_torchaudio().functional.melscale_fbanks(
            bank.n_fft // 2 + 1,
            bank.f_min,
            bank.f_max,
            bank.num_mel_bins,
            bank.sampling_rate,
            norm="slaney" if bank.mel_scale == "slaney" else None,
            mel_scale=bank.mel_scale,
        )
        return filters.to(device)
