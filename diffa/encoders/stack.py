"""Two encoders side by side, their frames brought to one rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffa.encoders.frontends import import_torchaudio
from diffa.errors import SpecError, suggest
from diffa.spec import registry
from diffa.spec.schema import read_schema
from diffa.types import Features, FeatureSpec


class Stack(nn.Module):
    """Frames of ``first`` with those of ``second`` that fall into the same time, concatenated.

    Frames have the rate of ``first``: frames of the second that fall into one of them are
    averaged, or one is repeated. The deeper encoder contributes as many states as the other has,
    evenly spread, including the first and the last. SALMONN (Tang et al. 2024) stacks Whisper and
    BEATs in this way.

    Args:
        first: The first encoder as in a spec, e.g. ``{name: whisper, checkpoint: ...}``.
        second: The second encoder as in a spec.
    """

    def __init__(
        self,
        *,
        first: Mapping[str, Any] = {"name": "tiny"},
        second: Mapping[str, Any] = {"name": "mel"},
    ) -> None:
        super().__init__()
        self.first, self.second = _build_encoder("first", first), _build_encoder("second", second)
        one, two = self.first.out, self.second.out
        self.sample_rate = max(self.first.sample_rate, self.second.sample_rate)
        layers, width = min(one.layers, two.layers), one.width + two.width
        self.out = FeatureSpec(width, layers, one.rate, math.gcd(width, one.heads))

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the features of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        one = self._encode(self.first, audio, lengths)
        two = self._encode(self.second, audio, lengths)
        frames = one.states[0].shape[1]
        ratio = self.second.out.rate / self.first.out.rate
        states = []
        for layer in range(self.out.layers + 1):
            own = one.states[self._depth(layer, self.first)]
            other = resample_frames(
                two.states[self._depth(layer, self.second)], two.extents, ratio, frames
            )
            inside = torch.arange(frames, device=own.device) < one.extents[:, None]
            other = torch.where(inside[..., None], other, 0)
            states.append(torch.cat([own, other.to(own.dtype)], dim=-1))
        return Features(tuple(states), one.lengths, one.extents)

    def _encode(self, encoder: Any, audio: Tensor, lengths: Tensor) -> Features:
        """Run an encoder at its own sample rate; nothing past a row's length is resampled."""
        rate = encoder.sample_rate
        if rate != self.sample_rate:
            inside = torch.arange(audio.shape[1], device=audio.device) < lengths[:, None]
            audio = torch.where(inside, audio, 0)
            audio = import_torchaudio().functional.resample(audio, self.sample_rate, rate)
            lengths = (-(-lengths * rate // self.sample_rate)).clamp(max=audio.shape[1])
        features: Features = encoder(audio, lengths)
        return features

    def _depth(self, layer: int, encoder: Any) -> int:
        return round(layer * int(encoder.out.layers) / self.out.layers)


def resample_frames(state: Tensor, extents: Tensor, ratio: float, frames: int) -> Tensor:
    """Average the frames (B, T, width) that fall into each of ``frames`` new ones.

    ``ratio`` old frames make a new one; where that is less than one, an old frame is repeated.
    Frames past a row's ``extents`` (B,) are not read: the last one replaces them.

        old  | 0 | 1 | 2 | 3 | 4 | 5 |      ratio 1.5: new frame n averages the old frames that
        new  |  0  |  1  |  2  |  3  |      overlap the interval from 1.5 n to 1.5 (n + 1)
    """
    steps = torch.arange(frames, device=state.device, dtype=torch.float64)
    # half a thousandth of a frame absorbs rates that are not exact, such as 9.8633
    start = (steps * ratio + 5e-4).floor().long()
    end = torch.maximum(start + 1, ((steps + 1) * ratio - 5e-4).ceil().long())
    last = extents[:, None].clamp(min=1)
    start, end = torch.minimum(start[None], last - 1), torch.minimum(end[None], last)
    # Means from differences of prefix sums, in float64 because long sums lose digits.
    sums = torch.nn.functional.pad(state.double().cumsum(dim=1), (0, 0, 1, 0))
    reach = sums.shape[2]
    above = sums.gather(1, end[..., None].expand(-1, -1, reach))
    below = sums.gather(1, start[..., None].expand(-1, -1, reach))
    return ((above - below) / (end - start)[..., None]).to(state.dtype)


def _build_encoder(place: str, part: Mapping[str, Any]) -> Any:
    """Build an encoder from its entry in a spec."""
    options = {key: value for key, value in part.items() if key != "name"}
    if not isinstance(part.get("name"), str):
        raise SpecError(f"{place} must name an encoder: {{name: whisper, ...}}")
    cls = registry.load_part("encoder", part["name"])
    known = read_schema(cls).options
    for option in options:
        if option not in known:
            raise SpecError(f"{place}.{option}: unknown option{suggest(option, known)}")
    return cls(**options)
