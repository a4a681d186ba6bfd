"""Change the sample rate of a waveform."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.errors import AudioError

_WIDTH, _ROLLOFF = 6, 0.99  # zero crossings and cutoff of torchaudio's windowed sinc
_MAX_TAPS = 1 << 20  # of torchaudio's kernel, which grows with the product of the reduced rates
_LONG = 1 << 22  # samples; longer waveforms are resampled by pieces
_PIECE = 1 << 14  # output samples computed at once


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Return ``waveform`` (..., S) at ``to_rate`` samples per second.

    torchaudio computes it. Rates with a large common multiple, such as 44,099 and 16,000, would
    make its kernel of gigabytes: there the same windowed sinc is evaluated sample by sample.

    Raises:
        AudioError: A rate is below 1, or torchaudio does not import.
    """
    if from_rate < 1 or to_rate < 1:
        raise AudioError(f"sample rates must be at least 1, got {from_rate} and {to_rate}")
    if from_rate == to_rate:
        return waveform
    shared = math.gcd(from_rate, to_rate)
    old, new = from_rate // shared, to_rate // shared
    if new * (2 * math.ceil(_WIDTH * old / (_ROLLOFF * min(old, new))) + old) > _MAX_TAPS:
        return _resample_by_sample(waveform, from_rate, to_rate)
    try:
        from torchaudio.functional import resample as convert
    except Exception as error:  # a torchaudio for another torch raises OSError or RuntimeError
        raise AudioError(
            f"audio at {from_rate} Hz is needed at {to_rate} Hz, but torchaudio does not import "
            f"({type(error).__name__}: {error}): install the torchaudio made for torch "
            f"{torch.__version__}, or give audio at {to_rate} Hz"
        ) from error
    size = waveform.shape[-1]
    if size <= _LONG:
        return torch.as_tensor(convert(waveform, from_rate, to_rate))
    # Pieces of whole periods, with the kernel's reach around them: memory does not grow with them.
    reach = old * math.ceil(2 * _WIDTH * max(1, old / new) / old + 1)
    step = old * (_LONG // old)
    pieces = []
    for start in range(0, size, step):
        before = min(start, reach)
        piece = waveform[..., start - before : start + step + reach]
        values = torch.as_tensor(convert(piece, from_rate, to_rate))
        skip, length = before // old * new, -(-min(step, size - start) * new // old)
        pieces.append(values[..., skip : skip + length])
    return torch.cat(pieces, dim=-1)


def _resample_by_sample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Evaluate y(n) = sum_k x(k) w(t) sinc(t), t = cutoff (k - n from / to), |t| < width."""
    cutoff = _ROLLOFF * min(1.0, to_rate / from_rate)  # in cycles per input sample, doubled
    reach = math.ceil(_WIDTH / cutoff)
    length = math.ceil(waveform.shape[-1] * to_rate / from_rate)
    padded = F.pad(waveform, (reach, reach + 1))
    taps = torch.arange(-reach, reach + 1)
    pieces = []
    for start in range(0, length, _PIECE):
        numbers = torch.arange(start, min(start + _PIECE, length))
        # Exact in integers: whole and fractional part of n * from / to.
        whole = numbers * from_rate // to_rate
        fraction = (numbers * from_rate % to_rate).double() / to_rate
        t = ((taps - fraction[:, None]) * cutoff).clamp(-_WIDTH, _WIDTH)
        kernel = torch.sinc(t) * (t * (torch.pi / (2 * _WIDTH))).cos().square() * cutoff
        values = padded[..., (whole[:, None] + taps + reach).clamp(max=padded.shape[-1] - 1)]
        pieces.append((values * kernel.to(waveform.dtype)).sum(dim=-1))
    return torch.cat(pieces, dim=-1)
