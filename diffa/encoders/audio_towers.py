"""Front ends of the audio towers of Qwen2-Audio, Audio Flamingo 3 and Qwen2.5-Omni."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from diffa.encoders.mel import LogMelConfig, log_mel
from diffa.encoders.windows import length_mask
from diffa.types import FeatureSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _TowerFrontEnd:
    """What the towers share: Whisper's log-mel and shape, and pairs of frames averaged."""

    masks_padding = True
    min_samples = 640  # four hops are one frame

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        self.mel = LogMelConfig(
            num_mel_bins=config.num_mel_bins,
            n_fft=preprocessor.get("n_fft", 400),
            hop_length=preprocessor.get("hop_length", 160),
            sampling_rate=preprocessor.get("sampling_rate", 16000),
        )
        self.sample_rate = self.mel.sampling_rate
        self.out = FeatureSpec(
            width=config.d_model,
            layers=config.encoder_layers,
            rate=self.mel.sampling_rate / self.mel.hop_length / 4,
            heads=config.encoder_attention_heads,
        )

    def hops(self, samples: int) -> int:
        """Return the mel frames of ``samples``."""
        return -(-samples // self.mel.hop_length)

    def count_frames(self, samples: int) -> int:
        """Return the frames of a window of ``samples``: pairs of the convolutions' frames."""
        return ((self.hops(samples) - 1) // 2 + 1) // 2


class QwenAudioFrontEnd(_TowerFrontEnd):
    """Qwen2-Audio's and Audio Flamingo 3's: Whisper over 30 s windows, then pairs averaged.

    States before the last are averaged likewise, so that all have 25 frames per second. What
    lies past a window's true frames is hidden from attention, as both models do.
    """

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(config, preprocessor)
        self.window_samples = 2 * config.max_source_positions * self.mel.hop_length
        self._qwen = config.model_type == "qwen2_audio_encoder"

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        features = log_mel(pad(waves, (0, self.window_samples - waves.shape[1])), self.mel)
        features = features.to(model.dtype)
        hops = [self.hops(size) for size in sizes]
        if self._qwen:
            mask = {
                "attention_mask": _attention_bias([(hop - 1) // 2 + 1 for hop in hops], features)
            }
        else:
            mask = {"input_features_mask": length_mask(hops, features.transpose(1, 2)).long()}
        out = model(features, **mask, output_hidden_states=True)
        return [*(_pool(state) for state in out.hidden_states[:-1]), out.last_hidden_state]


class QwenOmniFrontEnd(_TowerFrontEnd):
    """Qwen2.5-Omni's: attention within two seconds at a time, rows packed, any length.

    The last state is the one that its projection to the language model's width reads.
    """

    window_samples = None

    def __init__(self, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(config, preprocessor)
        self._chunk = 2 * int(config.n_window)

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        mel = self.mel
        # zeros after the audio, so that the last frame does not read its reflection
        features = log_mel(pad(waves, (0, mel.hop_length + mel.n_fft)), mel)
        hops = [self.hops(size) for size in sizes]
        # The encoder takes the rows packed end to end, (bins, sum of hops), and their lengths.
        packed = torch.cat(
            [row[:, :hop] for row, hop in zip(features, hops, strict=True)], dim=1
        ).to(model.dtype)
        lengths = torch.tensor(hops, device=waves.device)
        out = model(packed, feature_lens=lengths, output_hidden_states=True)
        sizes = [self._convolved(hop) for hop in hops]
        states = [
            [_average_pairs(row) for row in state.split(sizes)] for state in out.hidden_states[:-1]
        ]
        # ``proj`` is left out of the model, so its output is the last norm's
        states.append(list(out.last_hidden_state.split([size // 2 for size in sizes])))
        return [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in states]

    def _convolved(self, hops: int) -> int:
        # Each chunk is convolved alone (stride 2), so an odd rest rounds up.
        whole, rest = divmod(hops, self._chunk)
        return whole * (self._chunk // 2) + (rest + 1) // 2


def _average_pairs(frames: Tensor) -> Tensor:
    """Average pairs of frames (T, width); an odd last one is left out."""
    return reduce(frames[: len(frames) // 2 * 2], "(t p) d -> t d", "mean", p=2)


def _pool(state: Tensor) -> Tensor:
    """Average pairs of frames (M, T, width) as the tower's own pooling does."""
    pooled = avg_pool1d(rearrange(state, "m t d -> m d t"), 2)
    return rearrange(pooled, "m d t -> m t d")


def _attention_bias(counts: list[int], features: Tensor) -> Tensor:
    """Return what is added to scores (M, 1, T, T): the lowest number past each row's frames."""
    frames = (features.shape[2] - 1) // 2 + 1
    inside = length_mask(counts, features.new_zeros(len(counts), frames))
    bias = torch.zeros_like(inside, dtype=features.dtype)
    bias = bias.masked_fill(~inside, torch.finfo(features.dtype).min)
    return bias[:, None, None].expand(-1, 1, frames, -1)
