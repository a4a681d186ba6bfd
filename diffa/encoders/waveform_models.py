"""Front ends of wav2vec 2.0 and its relatives, wav2vec2-BERT and Parakeet: audio of any length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from diffa.encoders.frontends import (
    MelFilterBank,
    feature_spec,
    kaldi_fbank,
    mel_spectrogram,
    normalise_waves,
    preemphasis,
)
from diffa.encoders.windows import length_mask

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class WaveformFrontEnd:
    """Front end of wav2vec 2.0, HuBERT, WavLM and data2vec: convolutions over the waveform itself.

    Published models with ``feat_extract_norm: layer`` were trained with normalised waveforms and
    mask padding. Those with ``group`` normalise over all of a row's time, and data2vec's stacked
    position convolutions spread padding: their rows share a batch only at equal length.
    """

    window_samples = None

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        self._convs = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        layered = getattr(config, "feat_extract_norm", "layer") == "layer"  # data2vec has no choice
        self.masks_padding = layered and config.model_type != "data2vec-audio"
        self._normalise = preprocessor.get("do_normalize", layered)
        self.sample_rate = preprocessor.get("sampling_rate", 16000)
        self.min_samples = 1  # backwards from one frame: what each convolution needs
        for kernel, stride in reversed(self._convs):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        self.out = feature_spec(config, self.sample_rate / math.prod(config.conv_stride))

    def count_frames(self, samples: int) -> int:
        """Return the frames of a window of ``samples``: what the convolutions leave."""
        for kernel, stride in self._convs:
            samples = (samples - kernel) // stride + 1
        return samples

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        waves = normalise_waves(waves, sizes) if self._normalise else waves
        mask = length_mask(sizes, waves).long() if self.masks_padding else None
        return all_states(
            model(waves.to(model.dtype), attention_mask=mask, output_hidden_states=True)
        )


class Wav2Vec2BertFrontEnd:
    """Front end of wav2vec2-BERT: pairs of Kaldi filter banks, normalised per bin."""

    window_samples = None
    masks_padding = True
    min_samples = 720  # two pairs of frames, for a variance to exist

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        self.sample_rate = preprocessor.get("sampling_rate", 16000)
        self._stack = int(preprocessor.get("stride", 2))
        self._bins = config.feature_projection_input_dim // self._stack
        self.out = feature_spec(config, 100 / self._stack)

    def count_frames(self, samples: int) -> int:
        """Return the frames of a window of ``samples``: whole pairs of 10 ms hops."""
        return (1 + (samples - 400) // 160) // self._stack

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        counts = [self.count_frames(size) for size in sizes]
        features = waves.new_zeros(len(sizes), max(counts), self._bins * self._stack)
        for place, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            features[place, :count] = self._fbank(waves[place, :size], count)
        mask = length_mask(counts, features).long()
        features = features.to(model.dtype)
        return all_states(model(features, attention_mask=mask, output_hidden_states=True))

    def _fbank(self, wave: Tensor, count: int) -> Tensor:
        # Kaldi expects the scale of 16-bit integers; its floor depends on it
        bank = kaldi_fbank(
            wave * 2**15,
            num_mel_bins=self._bins,
            sampling_rate=self.sample_rate,
            window_type="povey",
        )
        bank = (bank - bank.mean(dim=0)) / (bank.var(dim=0) + 1e-7).sqrt()
        return rearrange(bank[: count * self._stack], "(t s) f -> t (s f)", s=self._stack)


class ParakeetFrontEnd:
    """Parakeet's FastConformer: log-mel normalised per bin, shortened eightfold, masked."""

    window_samples = None
    masks_padding = True

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        self.sample_rate = preprocessor.get("sampling_rate", 16000)
        self._hop = int(preprocessor.get("hop_length", 160))
        self._win = preprocessor.get("win_length", 400)
        self._emphasis = preprocessor.get("preemphasis", 0.97)
        n_fft, bins = preprocessor.get("n_fft", 512), config.num_mel_bins
        rate = self.sample_rate
        self._bank = MelFilterBank(bins, n_fft, rate, 0.0, rate / 2, "slaney")
        self._halvings = int(math.log2(config.subsampling_factor))
        self._kernel = int(config.subsampling_conv_kernel_size)
        self.min_samples = 2 * self._hop  # two frames, for a variance to exist
        self.out = feature_spec(config, self.sample_rate / self._hop / config.subsampling_factor)

    def count_frames(self, samples: int) -> int:
        """Return the frames of a window of ``samples``: what the strided convolutions leave."""
        count = samples // self._hop
        for _ in range(self._halvings):
            count = (count + (self._kernel - 1) // 2 * 2 - self._kernel) // 2 + 1
        return count

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        waves = preemphasis(waves, self._emphasis) if self._emphasis else waves
        # Pre-emphasis leaks the last sample into the padding.
        waves = torch.where(length_mask(sizes, waves), waves, 0)
        mel = mel_spectrogram(
            waves,
            self._bank,
            hop_length=self._hop,
            win_length=self._win,
            periodic=False,
            pad_mode="constant",
        )
        counts = [size // self._hop for size in sizes]
        inside = length_mask(counts, mel)
        features = self._normalise((mel + 2**-24).log(), inside).to(model.dtype)
        return all_states(model(features, attention_mask=inside, output_hidden_states=True))

    def _normalise(self, mel: Tensor, inside: Tensor) -> Tensor:
        mask = inside[..., None]
        count = mask.sum(dim=1, keepdim=True)
        mean = (mel * mask).sum(dim=1, keepdim=True) / count
        centred = (mel - mean) * mask
        std = (centred.square().sum(dim=1, keepdim=True) / (count - 1)).sqrt()
        return centred / (std + 1e-5)


def all_states(out: Any) -> list[Tensor]:
    """Return all hidden states of a model's output, the last one after the final norm."""
    return [*out.hidden_states[:-1], out.last_hidden_state]
