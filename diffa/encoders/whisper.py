"""Whisper's encoder, any size, with the published weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from diffa.checkpoints import read as ckpt
from diffa.encoders.mel import LogMelConfig
from diffa.encoders.whisper_windows import WindowedWhisper
from diffa.errors import CheckpointError


class Whisper(WindowedWhisper):
    """Whisper's encoder (Radford et al. 2022): all hidden states at 50 frames per second.

    The checkpoint sets the number of mel bins and the window's length. The published weights expect
    every window to be filled with silence.

    Args:
        checkpoint: Folder or Hub id of a Whisper model.
        revision: Revision of the Hub repository. Default: the newest.
        trailing_silence: Seconds of silence read after audio shorter than a window, for weights
            trained so. Default: fill the window.
        max_seconds: Seconds of each recording that are read; the rest is cut. DIFFA's published
            models cut at 30. Default: read all, window after window.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "openai/whisper-small",
        revision: str | None = None,
        trailing_silence: float | None = None,
        max_seconds: float | None = None,
    ) -> None:
        from transformers import WhisperConfig

        folder = ckpt.find_checkpoint(checkpoint, revision, weights=not ckpt.is_meta())
        config = WhisperConfig.from_dict(_whisper_config(folder))
        mel = _front_end(folder, config.num_mel_bins)
        super().__init__(config, mel, trailing_silence, max_seconds)
        if not ckpt.is_meta():
            ckpt.load_state(self.encoder, _weights(folder), source=folder)
            self.encoder.float()  # large-v3 is published in float16


def _whisper_config(folder: Path) -> dict[str, object]:
    config = ckpt.load_config(folder, "config.json")
    if config.get("model_type") != "whisper":
        raise CheckpointError(
            f"{folder / 'config.json'} describes a {config.get('model_type')!r} model, "
            "not a 'whisper' one"
        )
    return config


def _front_end(folder: Path, num_mel_bins: int) -> LogMelConfig:
    """Return the front end in preprocessor_config.json, else Whisper's own."""
    default = LogMelConfig(num_mel_bins)
    if not (folder / "preprocessor_config.json").is_file():
        return default
    fields = ckpt.load_config(folder, "preprocessor_config.json")
    fields["num_mel_bins"] = fields.get("feature_size", num_mel_bins)
    mel = default._replace(**{name: fields[name] for name in default._fields if name in fields})
    if mel.num_mel_bins != num_mel_bins:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json has {mel.num_mel_bins} mel bins, config.json "
            f"{num_mel_bins}"
        )
    return mel


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return the encoder's weights from a whole Whisper, one without a head, or a bare encoder."""
    for prefix in ("model.encoder.", "encoder."):
        if state := ckpt.read_weights(folder, prefix):
            return state
    return ckpt.read_weights(folder)
