"""How wav2vec 2.0 and its kin, wav2vec2-BERT and Parakeet listen: no window, any length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diffa.encoders import frontends as fronts
from diffa.types import FeatureSpec


class Waves:
    """wav2vec 2.0, HuBERT, WavLM, data2vec: convolutions over the waveform itself.

    Published models with ``feat_extract_norm: layer`` were trained behind a levelled waveform
    and mask padding; those with ``group`` normalise over all of a row's time, and data2vec's
    stacked position convolutions spread padding: their rows share a batch only at equal length.
    """

    window = None

    def __init__(self, config: Any, told: Mapping[str, Any]) -> None:
        self._convs = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        layered = getattr(config, "feat_extract_norm", "layer") == "layer"  # data2vec has no choice
        self.together = layered and config.model_type != "data2vec-audio"
        self._level = told.get("do_normalize", layered)
        self.sample_rate = told.get("sampling_rate", 16000)
        self.least = 1
        for kernel, stride in reversed(self._convs):
            self.least = (self.least - 1) * stride + kernel
        self.out = FeatureSpec(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            rate=self.sample_rate / math.prod(config.conv_stride),
            heads=config.num_attention_heads,
        )

    def frames(self, samples: int) -> int:
        """Return the frames of so many samples: what the convolutions leave."""
        for kernel, stride in self._convs:
            samples = (samples - kernel) // stride + 1
        return samples

    def hear(self, model: Any, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S)."""
        heard = fronts.levelled(waves, sizes) if self._level else waves
        mask = fronts.inside(sizes, waves).long() if self.together else None
        heard = heard.to(model.dtype)
        return last(model(heard, attention_mask=mask, output_hidden_states=True))


class Bert:
    """wav2vec2-BERT: pairs of Kaldi filter banks, levelled per bin, under a mask (w2v-BERT 2.0)."""

    window = None
    together = True
    least = 720  # two pairs of frames, for a variance to exist

    def __init__(self, config: Any, told: Mapping[str, Any]) -> None:
        self.sample_rate = told.get("sampling_rate", 16000)
        self._stack = int(told.get("stride", 2))
        self._bins = config.feature_projection_input_dim // self._stack
        self.out = FeatureSpec(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            rate=100 / self._stack,
            heads=config.num_attention_heads,
        )

    def frames(self, samples: int) -> int:
        """Return the frames of so many samples: whole pairs of 10 ms hops."""
        return (1 + (samples - 400) // 160) // self._stack

    def hear(self, model: Any, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S)."""
        counts = [self.frames(size) for size in sizes]
        features = waves.new_zeros(len(sizes), max(counts), self._bins * self._stack)
        for place, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            features[place, :count] = self._front(waves[place, :size], count)
        mask = fronts.inside(counts, features).long()
        features = features.to(model.dtype)
        return last(model(features, attention_mask=mask, output_hidden_states=True))

    def _front(self, wave: Tensor, count: int) -> Tensor:
        # Kaldi's scale is 16-bit integers; its floor matters after that scaling only
        bank = fronts.kaldi(wave * 2**15, bins=self._bins, rate=self.sample_rate, window="povey")
        bank = (bank - bank.mean(dim=0)) / (bank.var(dim=0) + 1e-7).sqrt()
        return rearrange(bank[: count * self._stack], "(t s) f -> t (s f)", s=self._stack)


class Parakeet:
    """Parakeet's FastConformer: log-mel levelled per bin, shortened eightfold, under a mask."""

    window = None
    together = True

    def __init__(self, config: Any, told: Mapping[str, Any]) -> None:
        self.sample_rate = told.get("sampling_rate", 16000)
        self._hop = int(told.get("hop_length", 160))
        self._win = told.get("win_length", 400)
        self._emphasis = told.get("preemphasis", 0.97)
        fft, bins = told.get("n_fft", 512), config.num_mel_bins
        self._bank = fronts.Bank(bins, fft, self.sample_rate, 0.0, self.sample_rate / 2, "slaney")
        self._halvings = int(math.log2(config.subsampling_factor))
        self._kernel = int(config.subsampling_conv_kernel_size)
        self.least = 2 * self._hop  # two frames, for a variance to exist
        self.out = FeatureSpec(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            rate=self.sample_rate / self._hop / config.subsampling_factor,
            heads=config.num_attention_heads,
        )

    def frames(self, samples: int) -> int:
        """Return the frames of so many samples: what the strided convolutions leave."""
        count = samples // self._hop
        for _ in range(self._halvings):
            count = (count + (self._kernel - 1) // 2 * 2 - self._kernel) // 2 + 1
        return count

    def hear(self, model: Any, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S)."""
        waves = fronts.emphasise(waves, self._emphasis) if self._emphasis else waves
        waves = torch.where(fronts.inside(sizes, waves), waves, 0)
        mel = fronts.power_mel(
            waves, self._bank, hop=self._hop, win=self._win, symmetric=True, mode="constant"
        )
        counts = [size // self._hop for size in sizes]
        there = fronts.inside(counts, mel)
        features = self._level((mel + 2**-24).log(), there).to(model.dtype)
        return last(model(features, attention_mask=there, output_hidden_states=True))

    def _level(self, mel: Tensor, there: Tensor) -> Tensor:
        mask = there[..., None]
        count = mask.sum(dim=1, keepdim=True)
        mean = (mel * mask).sum(dim=1, keepdim=True) / count
        centred = (mel - mean) * mask
        spread = (centred.square().sum(dim=1, keepdim=True) / (count - 1)).sqrt()
        return centred / (spread + 1e-5)


def last(out: Any) -> list[Tensor]:
    """Return all hidden states of a model's output, the last one after the final norm."""
    return [*out.hidden_states[:-1], out.last_hidden_state]
