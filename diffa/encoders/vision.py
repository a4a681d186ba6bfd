"""Any vision backbone of timm, with a spectrogram as its image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from diffa.checkpoints import read as ckpt
from diffa.encoders.spectrogram_models import normalised_fbanks
from diffa.encoders.windows import encode_windows
from diffa.errors import PluginError, SpecError, check_at_least
from diffa.types import Features, FeatureSpec

RATE = 16000
# AudioSet's mean and deviation of Kaldi filter banks, as AST and AudioMAE were trained with
MEAN, STD = -4.2677393, 4.5689974


class Timm(nn.Module):
    """A timm backbone over log filter banks (time x ``num_mel_bins``), frequencies averaged away.

    The states are the blocks' (or stages') outputs that are as wide as the last one, then the
    last one normalised: a transformer gives all its blocks, a pyramid its last stage. Audio is
    read in windows of ``window_seconds``; a frame is what covers one patch or stride of time.

    Args:
        model: Name of a timm model.
        num_mel_bins: Mel filters: the image's width.
        window_seconds: Length of one window: the image's height, one row per 10 ms.
        pretrained: Let timm download its published weights; colour channels are summed.
        checkpoint: Folder or Hub id of weights in timm's layout.
        revision: Revision of the Hub repository. Default: the newest.
        seed: Seed of the weights without a checkpoint.

    Raises:
        PluginError: timm is not installed.
        SpecError: timm does not know the model, or it cannot read such an image.
    """

    def __init__(
        self,
        *,
        model: str = "vit_tiny_patch16_224",
        num_mel_bins: int = 128,
        window_seconds: float = 10.24,
        pretrained: bool = False,
        checkpoint: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._rows = _rows(num_mel_bins, window_seconds)
        self._num_mel_bins, self._window_samples = num_mel_bins, self._rows * RATE // 100
        self.sample_rate = RATE
        if pretrained and checkpoint is not None:
            raise SpecError("pretrained and checkpoint exclude each other: drop one of them")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = _create(
                model, (self._rows, num_mel_bins), pretrained and not ckpt.is_meta()
            )
        if checkpoint is not None and not ckpt.is_meta():
            _fill(self.encoder, ckpt.find_checkpoint(checkpoint, revision))
        self.out, self._frames = self._probe(model)

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the features of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        return encode_windows(
            audio,
            lengths,
            self._encode,
            count_frames=lambda samples: min(
                self._frames, -(-samples * self._frames // self._window_samples)
            ),
            window_samples=self._window_samples,
            padded_size=lambda samples, _: max(400, samples),  # one window of the filter bank
            masks_padding=True,
        )

    def _encode(self, waves: Tensor, sizes: list[int]) -> list[Tensor]:
        images = normalised_fbanks(waves, sizes, self._rows, self._num_mel_bins, RATE, MEAN, STD)
        return self._states(images[:, None].to(next(self.encoder.parameters()).dtype))

    def _states(self, images: Tensor) -> list[Tensor]:
        """Return the states (M, T, width) of images (M, 1, rows, num_mel_bins)."""
        model: Any = self.encoder
        # Blocks are (M, width, time, frequency); the final state has the model's own layout.
        final, blocks = model.forward_intermediates(images, output_fmt="NCHW")
        high = blocks[-1].shape[2]
        if final.dim() == 3:
            final = final[:, getattr(model, "num_prefix_tokens", 0) or 0 :]
            final = rearrange(final, "m (h w) d -> m d h w", h=high)
        elif getattr(model, "output_fmt", "NCHW") == "NHWC":
            final = rearrange(final, "m h w d -> m d h w")
        # A pyramid's earlier stages differ in size; only states like the last one are kept.
        alike = [block for block in blocks if block.shape[1:] == final.shape[1:]]
        return [reduce(s, "m d h w -> m h d", "mean") for s in (*(alike or [final]), final)]

    @torch.no_grad()
    def _probe(self, name: str) -> tuple[FeatureSpec, int]:
        """Return what one image gives, and its frames."""
        weight = next(self.encoder.parameters())
        was = self.encoder.training
        try:
            self.encoder.eval()
            states = self._states(weight.new_zeros(1, 1, self._rows, self._num_mel_bins))
        except (RuntimeError, AssertionError, AttributeError, ValueError) as error:
            raise SpecError(
                f"timm's {name} cannot read an image of {self._rows} x {self._num_mel_bins} "
                f"({error}): "
                "choose num_mel_bins and window_seconds that its patches divide, or another model"
            ) from error
        self.encoder.train(was)
        _, wide, width = states[-1].shape
        blocks = getattr(self.encoder, "blocks", None)
        heads = getattr(getattr(blocks[0], "attn", None), "num_heads", 8) if blocks else 8
        rate = wide * 100 / self._rows
        return FeatureSpec(width, len(states) - 1, rate, math.gcd(width, heads)), wide


def _rows(num_mel_bins: int, seconds: float) -> int:
    check_at_least(1, num_mel_bins=num_mel_bins)
    rows = round(seconds * 100) if math.isfinite(seconds) else 0
    if rows < 4:
        raise SpecError(f"window_seconds must be at least 0.04 and finite, got {seconds}")
    return rows


def _create(name: str, image: tuple[int, int], pretrained: bool) -> Any:
    """Return a model for one-channel images; conv nets take no image size, nor need one."""
    try:
        import timm
    except ImportError as error:
        hint = "pip install 'diffa-audio[timm]'"
        raise PluginError(f"encoder 'timm' needs timm ({error}): {hint}") from error
    options = {"pretrained": pretrained, "in_chans": 1, "num_classes": 0}
    try:
        try:
            return timm.create_model(name, img_size=image, **options)
        except TypeError:
            return timm.create_model(name, **options)
    except RuntimeError as error:
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        known = f"; known: {', '.join(close)} ..." if close else "; see timm.list_models()"
        raise SpecError(f"timm cannot make {name!r} ({error}){known}") from error


def _fill(model: nn.Module, folder: Path) -> None:
    """Load timm's layout without its classifier, colours summed to one channel."""
    config: Mapping[str, Any] = getattr(model, "default_cfg", {})  # set by timm
    head = config.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((head,) if isinstance(head, str) else head))
    state = {k: v for k, v in ckpt.read_weights(folder).items() if not k.startswith(heads)}
    first = f"{config.get('first_conv')}.weight"
    if first in state and state[first].dim() == 4 and state[first].shape[1] == 3:
        state[first] = state[first].sum(dim=1, keepdim=True)
    ckpt.load_state(model, state, source=folder)
