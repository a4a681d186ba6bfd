"""Audio encoders of transformers: a table of model families and the part that runs them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffa.checkpoints import read as ckpt
from diffa.encoders.audio_towers import QwenAudioFrontEnd, QwenOmniFrontEnd
from diffa.encoders.spectrogram_models import ASTFrontEnd, CLAPFrontEnd
from diffa.encoders.waveform_models import (
    ParakeetFrontEnd,
    Wav2Vec2BertFrontEnd,
    WaveformFrontEnd,
)
from diffa.encoders.windows import encode_windows
from diffa.errors import CheckpointError, SpecError, suggest
from diffa.types import Features, FeatureSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FrontEnd(Protocol):
    """Input and output of a model family: features before the encoder, frames after it.

    Attributes:
        sample_rate: samples per second.
        out: shape of the hidden states.
        window_samples: size of the encoder's window. None: any length.
        min_samples: smallest size that the encoder reads.
        masks_padding: whether windows of different sizes may share a batch.
    """

    sample_rate: int
    out: FeatureSpec
    window_samples: int | None
    min_samples: int
    masks_padding: bool

    def count_frames(self, samples: int) -> int:
        """Return the frames of a window of ``samples``."""
        ...

    def encode(self, model: PreTrainedModel, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S) with true ``sizes``."""
        ...


class ModelFamily(NamedTuple):
    """Where a model family is found, in transformers and in its checkpoints.

    Attributes:
        model: class of the encoder, ``package.module:Class`` below ``transformers.models``.
        front_end: class of its front end.
        config_path: keys of the encoder's configuration in a whole model's.
        weight_prefix: prefix of the encoder's weights in a whole model's.
        unused: modules that no state depends on; they are left out.
    """

    model: str
    front_end: Any
    config_path: tuple[str, ...] = ()
    weight_prefix: str = ""
    unused: tuple[str, ...] = ()


_AST = "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer:ASTModel"
_CLAP = "clap.modeling_clap:ClapAudioModel"
_PARAKEET = "parakeet.modeling_parakeet:ParakeetEncoder"
_QWEN = "qwen2_audio.modeling_qwen2_audio:Qwen2AudioEncoder"
_FLAMINGO = "audioflamingo3.modeling_audioflamingo3:AudioFlamingo3Encoder"
_OMNI = "qwen2_5_omni.modeling_qwen2_5_omni:Qwen2_5OmniAudioEncoder"
_TOWER = (("audio_config",), "audio_tower.")
_THINKER = (("thinker_config", "audio_config"), "thinker.audio_tower.")
_HEAD = ("proj", "audio_bos_eos_token")  # the way to the language model's width
_FUSION = ("audio_encoder.patch_embed.fusion_model", "audio_encoder.patch_embed.mel_conv2d")

FAMILIES: dict[str, ModelFamily] = {
    "wav2vec2": ModelFamily("wav2vec2.modeling_wav2vec2:Wav2Vec2Model", WaveformFrontEnd),
    "hubert": ModelFamily("hubert.modeling_hubert:HubertModel", WaveformFrontEnd),
    "wavlm": ModelFamily("wavlm.modeling_wavlm:WavLMModel", WaveformFrontEnd),
    "data2vec-audio": ModelFamily(
        "data2vec.modeling_data2vec_audio:Data2VecAudioModel", WaveformFrontEnd
    ),
    "wav2vec2-bert": ModelFamily(
        "wav2vec2_bert.modeling_wav2vec2_bert:Wav2Vec2BertModel", Wav2Vec2BertFrontEnd
    ),
    "audio-spectrogram-transformer": ModelFamily(_AST, ASTFrontEnd),
    "clap": ModelFamily(_CLAP, CLAPFrontEnd, ("audio_config",), "audio_model.", _FUSION),
    "clap_audio_model": ModelFamily(_CLAP, CLAPFrontEnd, unused=_FUSION),
    "parakeet_ctc": ModelFamily(_PARAKEET, ParakeetFrontEnd, ("encoder_config",), "encoder."),
    "parakeet_tdt": ModelFamily(_PARAKEET, ParakeetFrontEnd, ("encoder_config",), "encoder."),
    "parakeet_encoder": ModelFamily(_PARAKEET, ParakeetFrontEnd),
    "qwen2_audio": ModelFamily(_QWEN, QwenAudioFrontEnd, *_TOWER),
    "qwen2_audio_encoder": ModelFamily(_QWEN, QwenAudioFrontEnd),
    "audioflamingo3": ModelFamily(_FLAMINGO, QwenAudioFrontEnd, *_TOWER),
    "audioflamingo3_encoder": ModelFamily(_FLAMINGO, QwenAudioFrontEnd),
    "qwen2_5_omni": ModelFamily(_OMNI, QwenOmniFrontEnd, *_THINKER, _HEAD),
    "qwen2_5_omni_thinker": ModelFamily(_OMNI, QwenOmniFrontEnd, *_TOWER, _HEAD),
    "qwen2_5_omni_audio_encoder": ModelFamily(_OMNI, QwenOmniFrontEnd, unused=_HEAD),
}
"""Model families by the ``model_type`` of their configuration."""


class Pretrained(nn.Module):
    """An audio encoder of transformers: all its hidden states, true frames only.

    The family follows from ``model_type``: wav2vec2, hubert, wavlm, data2vec-audio,
    wav2vec2-bert, audio-spectrogram-transformer, clap, parakeet, qwen2_audio, audioflamingo3,
    qwen2_5_omni. Batch equals single: rows share a batch under the model's own mask where it
    has an exact one or where windows have one size, and only with rows of equal length else.

    Args:
        checkpoint: Folder or Hub id of an encoder, or of a whole model that contains one.
        revision: Revision of the Hub repository. Default: the newest.
        config: A ``config.json`` with its ``model_type`` as a mapping, instead of a checkpoint;
            weights are drawn from ``seed``.
        window_seconds: Read longer audio in windows of this many seconds. Default: any length, or
            the encoder's own window.
        seed: Seed of the weights without a checkpoint.

    Raises:
        SpecError: neither or both of checkpoint and config, or a family that is not known.
        CheckpointError: weights that are missing or do not fit.
    """

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        window_seconds: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        folder, fields = ckpt.resolve_config(checkpoint, revision, config)
        family = _model_family(fields, str(folder or "config"))
        cls = _import_class(family.model)
        model_config = _encoder_config(cls, family, fields)
        front_end: FrontEnd = family.front_end(model_config, _preprocessor(folder))
        self._front_end = front_end
        self._window_samples = _window_samples(front_end, window_seconds)
        self.sample_rate, self.out = front_end.sample_rate, front_end.out
        # A dry run and a configuration without weights construct the class; others load it.
        if folder is None or ckpt.is_meta():
            self.encoder = _init_model(cls, model_config, seed)
        else:
            self.encoder = _load_model(cls, model_config, folder, family.weight_prefix)
        for path in family.unused:
            parent, _, name = path.rpartition(".")
            owner = self.encoder.get_submodule(parent)
            if hasattr(owner, name):
                setattr(owner, name, nn.Identity())

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the features of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        front_end = self._front_end
        return encode_windows(
            audio,
            lengths,
            lambda waves, sizes: front_end.encode(self.encoder, waves, sizes),
            count_frames=front_end.count_frames,
            window_samples=self._window_samples,
            padded_size=lambda samples, _: max(front_end.min_samples, samples),
            masks_padding=front_end.masks_padding,
        )


def _model_family(fields: Mapping[str, Any], source: str) -> ModelFamily:
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise SpecError(
            f"{source}: pretrained knows no audio encoder of model_type {name!r}"
            f"{suggest(str(name), FAMILIES)}"
        )
    return FAMILIES[str(name)]


def _import_class(target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"the installed transformers has no {name} ({error}): pip install -U transformers"
        ) from error


def _encoder_config(cls: Any, family: ModelFamily, fields: Mapping[str, Any]) -> Any:
    """Return the encoder's own configuration, its training-time randomness switched off."""
    for key in family.config_path:
        fields = fields.get(key) or {}
    config = cls.config_class.from_dict(dict(fields))
    # a skipped layer would leave a gap among the states, and masking belongs to pre-training
    for field in ("layerdrop", "encoder_layerdrop", "mask_time_prob", "mask_feature_prob"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    if hasattr(config, "add_adapter"):
        config.add_adapter = False  # its frames would be fewer than the layers'
    return config


def _preprocessor(folder: Path | None) -> Mapping[str, Any]:
    """Return what preprocessor_config.json says; nothing where there is none."""
    if folder is None:
        return {}
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            fields = ckpt.load_config(folder, file)
            inner = fields.get("feature_extractor", fields)
            return inner if isinstance(inner, Mapping) else {}
    return {}


def _window_samples(front_end: FrontEnd, seconds: float | None) -> int | None:
    if seconds is None:
        return front_end.window_samples
    if front_end.window_samples is not None:
        own = front_end.window_samples / front_end.sample_rate
        raise SpecError(
            f"window_seconds: this encoder's window is {own:g} s; leave window_seconds out"
        )
    samples = round(seconds * front_end.sample_rate) if seconds < 1e6 else 0
    if samples < front_end.min_samples:
        least = front_end.min_samples / front_end.sample_rate
        raise SpecError(f"window_seconds must be at least {least:g} and finite, got {seconds}")
    return samples


def _init_model(cls: Any, config: Any, seed: int) -> Any:
    if ckpt.is_meta():
        return cls(config).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).float()


def _load_model(cls: Any, config: Any, folder: Path, prefix: str) -> Any:
    """Return the encoder with published weights; transformers renames keys of older layouts."""
    state = ckpt.read_weights(folder, prefix) or ckpt.read_weights(folder)
    ckpt.check_weights(state, source=folder)
    try:
        model, report = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # shapes that differ raise a RuntimeError with a table
        raise CheckpointError(f"{folder} does not fit {cls.__name__}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if missing[6:] else "")
        raise CheckpointError(f"{folder} does not fit {cls.__name__}. missing: {names}")
    return model
