"""Whisper's encoder, any size, with the published weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffa.checkpoints import read as ckpt
from diffa.encoders.mel import Mel
from diffa.encoders.windows import WindowedWhisper, checked
from diffa.errors import CheckpointError
from diffa.types import FeatureSpec


class Whisper(WindowedWhisper):
    """Whisper's encoder (Radford et al. 2022): all hidden states at 50 frames per second.

    ``checkpoint`` is a Whisper folder or Hub id; it says how many mel bins there are and how
    long a window is. Longer audio is read in several windows, never cut. The published weights
    expect every window filled up with silence; ``trailing_silence`` seconds of it are enough for weights
    that were trained so.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "openai/whisper-small",
        revision: str | None = None,
        trailing_silence: float | None = None,
    ) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        self.trailing_silence = checked(trailing_silence)
        folder = ckpt.find_checkpoint(checkpoint, revision, weights=not ckpt.is_meta())
        config = WhisperConfig.from_dict(_whisper(folder))
        self.mel = _front_end(folder, config.num_mel_bins)
        self.sample_rate = self.mel.rate
        self.out = FeatureSpec(
            width=config.d_model,
            layers=config.encoder_layers,
            rate=self.mel.rate / self.mel.hop / 2,
            heads=config.encoder_attention_heads,
        )
        with torch.device("meta"):
            self.encoder = WhisperEncoder(config)
        if not ckpt.is_meta():
            ckpt.load_state(self.encoder, _weights(folder), source=folder)
            self.encoder.float()  # large-v3 is published in float16


def _whisper(folder: Path) -> dict[str, object]:
    config = ckpt.load_config(folder, "config.json")
    if config.get("model_type") != "whisper":
        raise CheckpointError(
            f"{folder / 'config.json'} describes a {config.get('model_type')!r} model, "
            "not a 'whisper' one"
        )
    return config


def _front_end(folder: Path, bins: int) -> Mel:
    """Return the front end that preprocessor_config.json describes; Whisper's own without one."""
    if not (folder / "preprocessor_config.json").is_file():
        return Mel(bins)
    told = ckpt.load_config(folder, "preprocessor_config.json")
    mel = Mel(
        bins=told.get("feature_size", bins),
        fft=told.get("n_fft", Mel().fft),
        hop=told.get("hop_length", Mel().hop),
        rate=told.get("sampling_rate", Mel().rate),
    )
    if mel.bins != bins:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json has {mel.bins} mel bins, config.json {bins}"
        )
    return mel


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return the encoder's tensors, of a Whisper with or without its head or of a bare encoder."""
    for prefix in ("model.encoder.", "encoder."):
        if state := ckpt.read_weights(folder, prefix):
            return state
    return ckpt.read_weights(folder)
