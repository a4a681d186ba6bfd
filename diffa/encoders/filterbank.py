"""Log filter banks as features: a baseline for trained encoders."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from diffa.encoders.frontends import MelFilterBank, kaldi_fbank, mel_spectrogram
from diffa.encoders.windows import encode_windows
from diffa.errors import SpecError, check_at_least
from diffa.types import Features, FeatureSpec

RATE = 16000
WINDOW = 400  # samples of 25 ms


class FilterBank(nn.Module):
    """Log filter banks of 25 ms windows, without a single weight.

    State 0 is the log energies, state 1 (the last) the same with zero mean and unit variance in
    every filter over the recording's true frames.

    Args:
        filterbank: Filter bank: ``mel`` is torchaudio's (HTK's scale, centred frames), ``kaldi``
            is Kaldi's.
        num_mel_bins: Mel filters.
        hop_seconds: Time from frame to frame, in seconds.
    """

    def __init__(
        self,
        *,
        filterbank: Literal["mel", "kaldi"] = "mel",
        num_mel_bins: int = 80,
        hop_seconds: float = 0.01,
    ) -> None:
        super().__init__()
        check_at_least(1, num_mel_bins=num_mel_bins)
        self._hop = round(hop_seconds * RATE) if 0 < hop_seconds < 10 else 0
        if self._hop < 1:
            raise SpecError(f"hop_seconds must lie between {1 / RATE} and 10, got {hop_seconds}")
        self.sample_rate, self._filterbank, self._num_mel_bins = RATE, filterbank, num_mel_bins
        self.out = FeatureSpec(num_mel_bins, 1, RATE / self._hop, math.gcd(num_mel_bins, 8))

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the filter banks of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        return encode_windows(
            audio,
            lengths,
            self._encode,
            count_frames=self._count_frames,
            window_samples=None,
            padded_size=lambda samples, _: max(WINDOW, samples),
        )

    def _count_frames(self, samples: int) -> int:
        # torchaudio centres frames on multiples of the hop, Kaldi keeps them inside the wave
        return 1 + (samples - (WINDOW if self._filterbank == "kaldi" else 0)) // self._hop

    def _encode(self, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        del sizes  # all equal: padding is not masked
        bank = torch.stack([self._log_energies(wave) for wave in waves])
        centred = bank - bank.mean(dim=1, keepdim=True)
        deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
        return [bank, centred / (deviation + 1e-5)]

    def _log_energies(self, wave: Tensor) -> Tensor:
        if self._filterbank == "kaldi":
            return kaldi_fbank(
                wave,
                num_mel_bins=self._num_mel_bins,
                sampling_rate=RATE,
                window_type="povey",
                hop_length=self._hop,
            )
        bank = MelFilterBank(self._num_mel_bins, WINDOW, RATE, 0.0, RATE / 2, "htk")
        mel = mel_spectrogram(
            wave[None],
            bank,
            hop_length=self._hop,
            win_length=WINDOW,
            periodic=True,
            pad_mode="reflect",
        )
        return mel[0].clamp(min=1e-10).log()
