"""Audio encoders of transformers: a table of families, and the one part that runs them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffa.checkpoints import read as ckpt
from diffa.encoders.audio_towers import Omni, Tower
from diffa.encoders.chunking import read
from diffa.encoders.spectrogram_models import Ast, Clap
from diffa.encoders.waveform_models import Bert, Parakeet, Waves
from diffa.errors import CheckpointError, SpecError, suggest
from diffa.types import Features, FeatureSpec


class Listener(Protocol):
    """How a family of encoders is fed, and what its states mean."""

    sample_rate: int
    out: FeatureSpec
    window: int | None
    least: int
    together: bool

    def frames(self, samples: int) -> int:
        """Return the frames of a piece of so many samples."""
        ...

    def hear(self, model: Any, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the states (M, T, width) of waves (M, S), each of its true size."""
        ...


class Family(NamedTuple):
    """Where a family of encoders lives.

    Attributes:
        model: class of the encoder, ``package.module:Class`` below ``transformers.models``.
        listener: how it is fed.
        path: keys to the encoder's own configuration inside a whole model's.
        prefix: of the encoder's weights inside a whole model's.
        unused: modules that no state depends on; they are left out.
    """

    model: str
    listener: Any
    path: tuple[str, ...] = ()
    prefix: str = ""
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

FAMILIES: dict[str, Family] = {
    "wav2vec2": Family("wav2vec2.modeling_wav2vec2:Wav2Vec2Model", Waves),
    "hubert": Family("hubert.modeling_hubert:HubertModel", Waves),
    "wavlm": Family("wavlm.modeling_wavlm:WavLMModel", Waves),
    "data2vec-audio": Family("data2vec.modeling_data2vec_audio:Data2VecAudioModel", Waves),
    "wav2vec2-bert": Family("wav2vec2_bert.modeling_wav2vec2_bert:Wav2Vec2BertModel", Bert),
    "audio-spectrogram-transformer": Family(_AST, Ast),
    "clap": Family(_CLAP, Clap, ("audio_config",), "audio_model.", _FUSION),
    "clap_audio_model": Family(_CLAP, Clap, unused=_FUSION),
    "parakeet_ctc": Family(_PARAKEET, Parakeet, ("encoder_config",), "encoder."),
    "parakeet_tdt": Family(_PARAKEET, Parakeet, ("encoder_config",), "encoder."),
    "parakeet_encoder": Family(_PARAKEET, Parakeet),
    "qwen2_audio": Family(_QWEN, Tower, *_TOWER),
    "qwen2_audio_encoder": Family(_QWEN, Tower),
    "audioflamingo3": Family(_FLAMINGO, Tower, *_TOWER),
    "audioflamingo3_encoder": Family(_FLAMINGO, Tower),
    "qwen2_5_omni": Family(_OMNI, Omni, *_THINKER, _HEAD),
    "qwen2_5_omni_thinker": Family(_OMNI, Omni, *_TOWER, _HEAD),
    "qwen2_5_omni_audio_encoder": Family(_OMNI, Omni, unused=_HEAD),
}
"""Families by the ``model_type`` of their configuration."""


class Pretrained(nn.Module):
    """An audio encoder of transformers: all its hidden states, true frames only.

    The family follows from ``model_type``: wav2vec2, hubert, wavlm, data2vec-audio,
    wav2vec2-bert, audio-spectrogram-transformer, clap, parakeet, qwen2_audio, audioflamingo3,
    qwen2_5_omni. Batch equals single: rows share a batch under the model's own mask where it
    has an exact one or where windows have one size, and only with rows of equal length else.

    Args:
        checkpoint: a folder or Hub id, of the encoder or of a whole model that holds it.
        revision: of the Hub repository.
        config: instead of a checkpoint, a ``config.json`` as a mapping with its ``model_type``;
            weights are then drawn from ``seed``.
        window_seconds: read longer audio in pieces of so many seconds; None where memory allows any
            length. Families with a window of their own have no choice.
        seed: of the weights where there is no checkpoint.

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
        folder, found = ckpt.resolve_config(checkpoint, revision, config)
        family = _family(found, str(folder or "config"))
        cls = _load(family.model)
        settings = _settings(cls, family, found)
        self._listener: Listener = family.listener(settings, _front(folder))
        self._window = _window(self._listener, window_seconds)
        self.sample_rate, self.out = self._listener.sample_rate, self._listener.out
        if folder is None or ckpt.is_meta():
            self.encoder = _draw(cls, settings, seed)
        else:
            self.encoder = _fill(cls, settings, folder, family.prefix)
        for path in family.unused:
            parent, _, name = path.rpartition(".")
            owner = self.encoder.get_submodule(parent)
            if hasattr(owner, name):
                setattr(owner, name, nn.Identity())

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the features of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        listener = self._listener
        return read(
            audio,
            lengths,
            lambda waves, sizes: listener.hear(self.encoder, waves, sizes),
            frames=listener.frames,
            window=self._window,
            least=listener.least,
            together=listener.together,
        )


def _family(found: Mapping[str, Any], source: str) -> Family:
    name = found.get("model_type")
    if name not in FAMILIES:
        raise SpecError(
            f"{source}: pretrained knows no audio encoder of model_type {name!r}"
            f"{suggest(str(name), FAMILIES)}"
        )
    return FAMILIES[str(name)]


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"the installed transformers has no {name} ({error}): pip install -U transformers"
        ) from error


def _settings(cls: Any, family: Family, found: Mapping[str, Any]) -> Any:
    """Return the encoder's own configuration, its training-time randomness switched off."""
    for key in family.path:
        found = found.get(key) or {}
    settings = cls.config_class.from_dict(dict(found))
    # a skipped layer would leave a gap among the states, and masking belongs to pre-training
    for field in ("layerdrop", "encoder_layerdrop", "mask_time_prob", "mask_feature_prob"):
        if hasattr(settings, field):
            setattr(settings, field, 0.0)
    if hasattr(settings, "add_adapter"):
        settings.add_adapter = False  # its frames would be fewer than the layers'
    return settings


def _front(folder: Path | None) -> Mapping[str, Any]:
    """Return what preprocessor_config.json says; nothing where there is none."""
    if folder is None:
        return {}
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            told = ckpt.load_config(folder, file)
            inner = told.get("feature_extractor", told)
            return inner if isinstance(inner, Mapping) else {}
    return {}


def _window(listener: Listener, seconds: float | None) -> int | None:
    if seconds is None:
        return listener.window
    if listener.window is not None:
        own = listener.window / listener.sample_rate
        raise SpecError(
            f"window_seconds: this encoder's window is {own:g} s; leave window_seconds out"
        )
    samples = round(seconds * listener.sample_rate) if seconds < 1e6 else 0
    if samples < listener.least:
        least = listener.least / listener.sample_rate
        raise SpecError(f"window_seconds must be at least {least:g} and finite, got {seconds}")
    return samples


def _draw(cls: Any, settings: Any, seed: int) -> Any:
    if ckpt.is_meta():
        return cls(settings).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(settings).float()


def _fill(cls: Any, settings: Any, folder: Path, prefix: str) -> Any:
    """Return the encoder with published weights; transformers renames keys of older layouts."""
    state = ckpt.read_weights(folder, prefix) or ckpt.read_weights(folder)
    try:
        model, report = cls.from_pretrained(
            None, config=settings, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # shapes that differ raise a RuntimeError with a table
        raise CheckpointError(f"{folder} does not fit {cls.__name__}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        told = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if missing[6:] else "")
        raise CheckpointError(f"{folder} does not fit {cls.__name__}. missing: {told}")
    return model
