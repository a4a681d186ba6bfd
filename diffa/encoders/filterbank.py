"""Filter banks as they are: the baseline that a trained encoder has to beat."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from diffa.encoders import frontends as fronts
from diffa.encoders.chunking import read
from diffa.errors import SpecError
from diffa.types import Features, FeatureSpec

RATE = 16000
WINDOW = 400  # samples of 25 ms


class FilterBank(nn.Module):
    """Log filter banks of 25 ms windows, without a single weight.

    State 0 is the log energies, state 1 (the last) the same with zero mean and unit variance in
    every filter over the recording's true frames.

    Args:
        filterbank: ``mel``, torchaudio's (HTK's scale, frames centred), or ``kaldi``, its filter banks.
        num_mel_bins: filters.
        hop_seconds: seconds from frame to frame.
    """

    def __init__(
        self,
        *,
        filterbank: Literal["mel", "kaldi"] = "mel",
        num_mel_bins: int = 80,
        hop_seconds: float = 0.01,
    ) -> None:
        super().__init__()
        if num_mel_bins < 1:
            raise SpecError(f"num_mel_bins must be at least 1, got {num_mel_bins}")
        self._hop = round(hop_seconds * RATE) if 0 < hop_seconds < 10 else 0
        if self._hop < 1:
            raise SpecError(f"hop_seconds must lie between {1 / RATE} and 10, got {hop_seconds}")
        self.sample_rate, self._filterbank, self._num_mel_bins = RATE, filterbank, num_mel_bins
        self.out = FeatureSpec(num_mel_bins, 1, RATE / self._hop, math.gcd(num_mel_bins, 8))

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the filter banks of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        return read(
            audio,
            lengths,
            self._hear,
            frames=self._frames,
            window=None,
            least=WINDOW,
            together=False,
        )

    def _frames(self, samples: int) -> int:
        # torchaudio centres frames on multiples of the hop, Kaldi keeps them inside the wave
        return 1 + (samples - (WINDOW if self._filterbank == "kaldi" else 0)) // self._hop

    def _hear(self, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        rows = [self._bank(wave[:size]) for wave, size in zip(waves, sizes, strict=True)]
        bank = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # of one length, in fact
        centred = bank - bank.mean(dim=1, keepdim=True)
        deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
        return [bank, centred / (deviation + 1e-5)]

    def _bank(self, wave: Tensor) -> Tensor:
        if self._filterbank == "kaldi":
            return fronts.kaldi(
                wave, bins=self._num_mel_bins, rate=RATE, window="povey", hop=self._hop
            )
        bank = fronts.Bank(self._num_mel_bins, WINDOW, RATE, 0.0, RATE / 2, "htk")
        mel = fronts.power_mel(
            wave[None], bank, hop=self._hop, win=WINDOW, symmetric=False, mode="reflect"
        )
        return mel[0].clamp(min=1e-10).log()
