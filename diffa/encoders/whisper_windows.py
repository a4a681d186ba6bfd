"""Run an encoder of Whisper's architecture over audio of any length, window after window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffa.audio import samples_of
from diffa.encoders.mel import LogMelConfig, log_mel
from diffa.encoders.windows import encode_windows
from diffa.errors import SpecError, check_non_negative
from diffa.types import Features, FeatureSpec

if TYPE_CHECKING:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder


class WindowedWhisper(nn.Module):
    """The forward passes that the encoders of Whisper's architecture share.

    Constructing it leaves the encoder's weights on the meta device; a subclass fills them.

    Args:
        config: architecture of the encoder.
        mel: log-mel front end.
        trailing_silence: seconds of silence read after audio shorter than a window. None: fill
            the window.
        max_seconds: seconds of each recording that are read. None: all.

    Raises:
        SpecError: ``trailing_silence`` or ``max_seconds`` is out of range.
    """

    def __init__(
        self,
        config: WhisperConfig,
        mel: LogMelConfig,
        trailing_silence: float | None,
        max_seconds: float | None,
    ) -> None:
        super().__init__()
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        check_non_negative(trailing_silence=trailing_silence)
        rate = mel.sampling_rate
        if max_seconds is not None and not (math.isfinite(max_seconds) and max_seconds * rate >= 1):
            raise SpecError(f"max_seconds must be positive and finite, or None, got {max_seconds}")
        self.mel, self.sample_rate = mel, rate
        self.trailing_silence, self.max_seconds = trailing_silence, max_seconds
        self.out = FeatureSpec(
            width=config.d_model,
            layers=config.encoder_layers,
            rate=rate / mel.hop_length / 2,
            heads=config.encoder_attention_heads,
        )
        with torch.device("meta"):
            self.encoder = WhisperEncoder(config)

    @property
    def window_frames(self) -> int:
        """Frames of one full window: the number of the encoder's positions."""
        return int(self.encoder.config.max_source_positions)

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the features of audio (B, S) whose rows hold ``lengths`` (B,) true samples.

        Audio longer than a window is read in several windows; it is cut only at ``max_seconds``.
        """
        if self.max_seconds is not None:
            samples_of(audio, lengths)  # raises AudioError before the cut hides a misfit
            samples = round(self.max_seconds * self.sample_rate)
            audio, lengths = audio[:, :samples], lengths.clamp(max=samples)
        frame = 2 * self.mel.hop_length  # samples of one frame: the second convolution has stride 2
        features = encode_windows(
            audio,
            lengths,
            lambda windows, _: self.encode_log_mel(log_mel(windows, self.mel)),
            count_frames=lambda samples: samples // frame,
            window_samples=self.window_frames * frame,
            padded_size=self._padded_size,
        )
        hops = _ceil_divide(lengths.to(audio.device), self.mel.hop_length)
        return features._replace(lengths=_ceil_divide(hops, 2))

    def encode_log_mel(self, log_mel: Tensor, *, position_offset: int = 0) -> tuple[Tensor, ...]:
        """Return every hidden state for log-mel frames; skips the front end and the windows.

        Use it to train on changed spectrograms (SpecAugment) or on audio shorter than a window.

        Args:
            log_mel: (M, mel bins, 2T), as ``diffa.encoders.mel.log_mel`` returns it.
            position_offset: position of the first frame in the encoder's window;
                ``position_offset`` + T must not exceed ``window_frames``.

        Returns:
            layers + 1 states, each (M, T, width); see ``hidden_states``.
        """
        return tuple(hidden_states(self.encoder, log_mel, position_offset=position_offset))

    def _padded_size(self, samples: int, windows: int) -> int:
        """Return the samples to read for a window: audio and trailing silence in whole seconds."""
        mel = self.mel
        frames = self.window_frames
        if self.trailing_silence is not None and windows == 1:
            silence = round(self.trailing_silence * mel.sampling_rate)
            seconds = max(1, math.ceil((samples + silence) / mel.sampling_rate))
            frames = min(frames, mel.sampling_rate // mel.hop_length // 2 * seconds)
        return 2 * frames * mel.hop_length


def hidden_states(
    encoder: WhisperEncoder, features: Tensor, *, position_offset: int = 0
) -> list[Tensor]:
    """Return the layers + 1 states (M, T, width) of a ``WhisperEncoder`` for mels (M, bins, 2T).

    The first frame takes position ``position_offset`` of the encoder's window.

    Entry 0 is the convolutions plus positions, the last one follows the final LayerNorm.
    Entry i follows layer i. The layers are run one by one because transformers leaves out the
    states of layers that layerdrop skips, which would shift all states after them.
    """
    features = features.to(encoder.conv1.weight.dtype)
    hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features))))
    hidden = rearrange(hidden, "m w t -> m t w")
    end = position_offset + hidden.shape[1]
    hidden = hidden + encoder.embed_positions.weight[position_offset:end]
    hidden = F.dropout(hidden, encoder.config.dropout, encoder.training)
    states = [hidden]
    for layer in encoder.layers:
        if not (encoder.training and _drop(encoder.config.encoder_layerdrop)):
            out = layer(hidden, None)
            hidden = out[0] if isinstance(out, tuple) else out  # a tuple in transformers 5.0
        states.append(hidden)
    states[-1] = encoder.layer_norm(hidden)
    return states


def _drop(probability: float) -> bool:
    return probability > 0 and torch.rand((), device="cpu").item() < probability


def _ceil_divide(count: Tensor, divisor: int) -> Tensor:
    return -(-count // divisor)
