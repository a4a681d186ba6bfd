"""How the audio towers of Qwen2-Audio, Audio Flamingo 3 and Qwen2.5-Omni listen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from diffa.encoders import frontends as fronts
from diffa.encoders.mel import Mel, log_mel
from diffa.types import FeatureSpec


class _Whisper:
    """What the towers share: Whisper's log-mel and shape, and pairs of frames averaged."""

    least = 640  # four hops are one frame

    def __init__(self, config: Any, told: Mapping[str, Any]) -> None:
        self.mel = Mel(
            bins=config.num_mel_bins,
            fft=told.get("n_fft", 400),
            hop=told.get("hop_length", 160),
            rate=told.get("sampling_rate", 16000),
        )
        self.sample_rate = self.mel.rate
        self.out = FeatureSpec(
            width=config.d_model,
            layers=config.encoder_layers,
            rate=self.mel.rate / self.mel.hop / 4,
            heads=config.encoder_attention_heads,
        )

    def hops(self, samples: int) -> int:
        """Return the mel frames of so many samples."""
        return -(-samples // self.mel.hop)

    def frames(self, samples: int) -> int:
        """Return the frames of so many samples: pairs of the convolutions' frames."""
        return ((self.hops(samples) - 1) // 2 + 1) // 2


class Tower:
    """Qwen2-Audio's and Audio Flamingo 3's: Whisper over 30 s windows, then pairs averaged.

    States before the last are averaged likewise, so that all have 25 frames per second. What
    lies past a window's true frames is hidden from attention, as both models do.
    """

    together = True

    def __init__(self, config: Any, told: Mapping[str, Any]) -> None:
        self._whisper = _Whisper(config, told)
        self.sample_rate, self.out = self._whisper.sample_rate, self._whisper.out
        self.least, self.frames = self._whisper.least, self._whisper.frames
        self.window = 2 * config.max_source_positions * self._whisper.mel.hop
        self._qwen = config.model_type == "qwen2_audio_encoder"

    def hear(self, model: Any, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S)."""
        features = log_mel(pad(waves, (0, self.window - waves.shape[1])), self._whisper.mel)
        features = features.to(model.dtype)
        hops = [self._whisper.hops(size) for size in sizes]
        if self._qwen:
            mask = {"attention_mask": _hide([(hop - 1) // 2 + 1 for hop in hops], features)}
        else:
            mask = {"input_features_mask": fronts.inside(hops, features.transpose(1, 2)).long()}
        out = model(features, **mask, output_hidden_states=True)
        return [*(_halve(state) for state in out.hidden_states[:-1]), out.last_hidden_state]


class Omni:
    """Qwen2.5-Omni's: attention within two seconds at a time, rows packed, any length.

    The last state is the one that its projection to the language model's width reads.
    """

    together = True
    window = None

    def __init__(self, config: Any, told: Mapping[str, Any]) -> None:
        self._whisper = _Whisper(config, told)
        self.sample_rate, self.out = self._whisper.sample_rate, self._whisper.out
        self.least, self.frames = self._whisper.least, self._whisper.frames
        self._chunk = 2 * int(config.n_window)

    def hear(self, model: Any, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S)."""
        mel = self._whisper.mel
        # zeros behind the audio, so that the last frame reads no mirror of it
        features = log_mel(pad(waves, (0, mel.hop + mel.fft)), mel)
        hops = [self._whisper.hops(size) for size in sizes]
        packed = torch.cat(
            [row[:, :hop] for row, hop in zip(features, hops, strict=True)], dim=1
        ).to(model.dtype)
        told = torch.tensor(hops, device=waves.device)
        out = model(packed, feature_lens=told, output_hidden_states=True)
        sizes = [self._convolved(hop) for hop in hops]
        states = [[_pairs(row) for row in state.split(sizes)] for state in out.hidden_states[:-1]]
        # ``proj`` is left out of the model, so its output is the last norm's
        states.append(list(out.last_hidden_state.split([size // 2 for size in sizes])))
        return [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in states]

    def _convolved(self, hops: int) -> int:
        whole, rest = divmod(hops, self._chunk)
        return whole * (self._chunk // 2) + (rest + 1) // 2


def _pairs(frames: Tensor) -> Tensor:
    """Average pairs of frames (T, width); an odd last one is left out."""
    return reduce(frames[: len(frames) // 2 * 2], "(t p) d -> t d", "mean", p=2)


def _halve(state: Tensor) -> Tensor:
    """Average pairs of frames (M, T, width) as the tower's own pooling does."""
    pooled = avg_pool1d(rearrange(state, "m t d -> m d t"), 2)
    return rearrange(pooled, "m d t -> m t d")


def _hide(counts: list[int], features: Tensor) -> Tensor:
    """Return what is added to scores (M, 1, T, T): the lowest number past each row's frames."""
    frames = (features.shape[2] - 1) // 2 + 1
    there = fronts.inside(counts, features.new_zeros(len(counts), frames))
    bias = torch.zeros_like(there, dtype=features.dtype)
    bias = bias.masked_fill(~there, torch.finfo(features.dtype).min)
    return bias[:, None, None].expand(-1, 1, frames, -1)
