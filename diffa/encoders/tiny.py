"""An encoder of Whisper's architecture with random weights, for tests and training from scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffa.checkpoints import read as checkpoint
from diffa.encoders.mel import LogMelConfig
from diffa.encoders.whisper_windows import WindowedWhisper
from diffa.errors import SpecError, check_at_least


class Tiny(WindowedWhisper):
    """Whisper's encoder at any size, with random weights.

    Args:
        width: Width of the hidden states.
        layers: Transformer layers.
        heads: Attention heads.
        num_mel_bins: Mel filters of the front end.
        window_seconds: Length of the encoder's window, in seconds.
        trailing_silence: Seconds of silence read after audio shorter than a window. Default: fill
            the window.
        max_seconds: Seconds of each recording that are read; the rest is cut. Default: read all,
            window after window.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        num_mel_bins: int = 80,
        window_seconds: float = 30.0,
        trailing_silence: float | None = None,
        max_seconds: float | None = None,
        seed: int = 0,
    ) -> None:
        from transformers import WhisperConfig

        check_at_least(1, layers=layers, heads=heads, num_mel_bins=num_mel_bins)
        if width < 4 or width % 2 or width % heads:
            raise SpecError(
                f"width must be even, at least 4 and a multiple of heads ({heads}), got {width}"
            )
        mel = LogMelConfig(num_mel_bins)
        config = WhisperConfig(
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            num_mel_bins=num_mel_bins,
            max_source_positions=_frames(window_seconds, mel.sampling_rate / mel.hop_length / 2),
        )
        super().__init__(config, mel, trailing_silence, max_seconds)
        if not checkpoint.is_meta():
            self.encoder.to_empty(device=torch.get_default_device())
            _init_weights(self.encoder, seed)


def _frames(seconds: float, rate: float) -> int:
    """Return the frames of a window of ``seconds``."""
    frames = round(seconds * rate) if math.isfinite(seconds) else 0
    if frames < 1:
        raise SpecError(f"window_seconds must be at least {1 / rate}, one frame, got {seconds}")
    return frames


@torch.no_grad()
def _init_weights(encoder: nn.Module, seed: int) -> None:
    """Draw weights of variance 1 / fan-in; positions are Whisper's sinusoids, norms are neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in encoder.named_parameters():
        if name == "embed_positions.weight":
            value.copy_(_sinusoids(*value.shape))
        elif value.dim() > 1:
            std = value[0].numel() ** -0.5
            value.copy_(torch.randn(value.shape, generator=generator, device="cpu") * std)
        else:
            value.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def _sinusoids(frames: int, width: int) -> Tensor:
    """Return positions (frames, width): sines, then cosines, with periods 2 pi to 20,000 pi."""
    half = width // 2
    periods = 10000.0 ** (torch.arange(half, device="cpu") / max(half - 1, 1))
    angles = torch.arange(frames, device="cpu")[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)
