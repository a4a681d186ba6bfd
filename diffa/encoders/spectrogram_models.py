"""Front ends of AST and CLAP: spectrograms of a fixed size as images, averaged over frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import pad

from diffa.encoders.frontends import MelFilterBank, feature_spec, kaldi_fbank, mel_spectrogram
from diffa.types import FeatureSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HOP = 160  # samples of AST's 10 ms


class ASTFrontEnd:
    """The Audio Spectrogram Transformer (Gong et al. 2021): patches over windows of 10.24 s.

    A frame is the mean of the patches of one time over all frequencies; the two class tokens
    are left out.
    """

    masks_padding = True
    min_samples = 400

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        self.sample_rate = preprocessor.get("sampling_rate", 16000)
        self._bins, self._hops = config.num_mel_bins, config.max_length
        self._mean = preprocessor.get("mean", -4.2677393)
        self._std = preprocessor.get("std", 4.5689974)
        self._stride = int(config.time_stride)
        self._high = (self._bins - config.patch_size) // config.frequency_stride + 1
        self._wide = int(self._hops - config.patch_size) // self._stride + 1
        self.window_samples = self._hops * HOP
        self.out = feature_spec(config, self._wide * self.sample_rate / self.window_samples)

    def count_frames(self, samples: int) -> int:
        """Return the frames of ``samples``: patches at least half a stride inside the audio."""
        rows = 1 + (samples - 400) // HOP
        return min(self._wide, (rows + self._stride // 2) // self._stride)

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        images = normalised_fbanks(
            waves, sizes, self._hops, self._bins, self.sample_rate, self._mean, self._std
        )
        out = model(images.to(model.dtype), output_hidden_states=True)
        states = [*out.hidden_states[:-1], out.last_hidden_state]
        return [
            reduce(state[:, 2:], "m (f t) d -> m t d", "mean", f=self._high) for state in states
        ]


def normalised_fbanks(
    waves: Tensor, sizes: list[int], hops: int, bins: int, rate: int, mean: float, std: float
) -> Tensor:
    """Return Kaldi filter banks (M, hops, bins) of waves (M, S): zeros past each row's end.

    The result is (x - mean) / (2 * std), as AST expects.
    """
    images = waves.new_zeros(len(sizes), hops, bins, dtype=torch.float32)
    for image, wave, size in zip(images, waves, sizes, strict=True):
        bank = kaldi_fbank(
            wave[:size],
            num_mel_bins=bins,
            sampling_rate=rate,
            window_type="hanning",
            hop_length=rate // 100,
        )
        image[: len(bank)] = bank[:hops]
    return (images - mean) / (2 * std)


class CLAPFrontEnd:
    """CLAP's audio tower, HTSAT (Chen et al. 2022): a Swin over windows of 10 s at 48 kHz.

    Its stages differ in width, so the states are two: what enters the last stage, and what
    leaves it normalised. 32 frames per window, frequencies averaged. A short window is filled
    with repeats of itself where the published extractor does so (``repeatpad``).
    """

    masks_padding = True

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        self.sample_rate = preprocessor.get("sampling_rate", 48000)
        self._hop, fft = (
            preprocessor.get("hop_length", 480),
            preprocessor.get("fft_window_size", 1024),
        )
        self.window_samples = int(preprocessor.get("nb_max_samples", 10 * self.sample_rate))
        self._repeats = preprocessor.get("padding", "repeatpad") == "repeatpad"
        # the two published models differ in both their truncation and their mel scale
        fused = preprocessor.get("truncation", "fusion" if config.enable_fusion else "rand_trunc")
        self._bank = MelFilterBank(
            config.num_mel_bins,
            fft,
            self.sample_rate,
            preprocessor.get("frequency_min", 0.0),
            preprocessor.get("frequency_max", 14000.0),
            "htk" if fused == "fusion" else "slaney",
        )
        self._channels = 4 if config.enable_fusion else 1
        self._rows = config.spec_size // config.num_mel_bins  # the image's bands of time
        shrunk = 2 ** (len(config.depths) - 1)
        self._wide = int(self._rows * (config.spec_size // config.patch_stride[1] // shrunk))
        self.min_samples = 1
        self.out = FeatureSpec(
            width=config.patch_embeds_hidden_size * shrunk,
            layers=1,
            rate=self._wide * self.sample_rate / self.window_samples,
            heads=config.num_attention_heads[-1],
        )

    def count_frames(self, samples: int) -> int:
        """Return the frames that begin within so many samples."""
        return min(self._wide, -(-samples * self._wide // self.window_samples))

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        filled = torch.stack([self._fill(w[:s]) for w, s in zip(waves, sizes, strict=True)])
        mel = mel_spectrogram(
            filled,
            self._bank,
            hop_length=self._hop,
            win_length=self._bank.n_fft,
            periodic=True,
            pad_mode="reflect",
        )
        decibels = 10 * mel.clamp(min=1e-10).log10()
        images = decibels[:, None].expand(-1, self._channels, -1, -1).to(model.dtype)
        longer = torch.zeros(len(sizes), 1, dtype=torch.bool, device=waves.device)
        out = model(images, is_longer=longer, output_hidden_states=True)
        before = rearrange(out.hidden_states[-2], "m d (r f) t -> m d f (r t)", r=self._rows)
        return [reduce(s, "m d f t -> m t d", "mean") for s in (before, out.last_hidden_state)]

    def _fill(self, wave: Tensor) -> Tensor:
        if self._repeats:
            wave = wave.repeat(self.window_samples // len(wave))
        return pad(wave, (0, self.window_samples - len(wave)))
