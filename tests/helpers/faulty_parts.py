"""A sound adapter and encoder, and adapters, encoders and backbones with one fault each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffa.backbones.llada import LLaDA
from diffa.backbones.llama import Llama
from diffa.canvas.kv_cache import AttentionContext
from diffa.types import Embeds, Features, FeatureSpec


class Pool(nn.Module):
    """A sound adapter: the mean of every two frames, through a linear map."""

    def __init__(self, source: FeatureSpec, width: int, *, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.out = nn.Linear(source.width, width)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        return lengths // self.stride

    def pooled(self, features: Features) -> tuple[Tensor, Tensor]:
        lengths = self.out_lengths(features.lengths)
        frames = features.states[-1][:, : int(lengths.max()) * self.stride]
        return frames.to(self.out.weight.dtype).unflatten(1, (-1, self.stride)).mean(2), lengths

    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        return self.hidden(self.out(frames), lengths)

    def hidden(self, values: Tensor, lengths: Tensor) -> Embeds:
        inside = torch.arange(values.shape[1]) < lengths[:, None]
        return Embeds(torch.where(inside[..., None], values, 0), lengths)


class DeadWeight(Pool):
    def __init__(self, source: FeatureSpec, width: int) -> None:
        super().__init__(source, width)
        self.unused = nn.Parameter(torch.zeros(3))


class WrongLengths(Pool):
    def out_lengths(self, lengths: Tensor) -> Tensor:
        return lengths // self.stride + 1

    def forward(self, features: Features) -> Embeds:
        frames = features.states[-1][:, : int(features.lengths.max()) // 2 * 2]
        values = self.out(frames.unflatten(1, (-1, 2)).mean(2))
        return self.hidden(values, features.lengths // self.stride)


class FallingLengths(Pool):
    def out_lengths(self, lengths: Tensor) -> Tensor:
        return lengths % 7


class PaddingLeak(Pool):
    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        everything = features.states[-1].mean(1, keepdim=True)
        return self.hidden(self.out(frames + everything.to(frames.dtype)), lengths)


class WindowLeak(Pool):
    """Reads to the end of the encoder's window, where only true frames are its own."""

    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        last, count = features.states[-1], features.extents[:, None]
        inside = (torch.arange(last.shape[1]) < count)[..., None]
        mean = torch.where(inside, last, 0).sum(1, keepdim=True) / count[..., None]
        return self.hidden(self.out(frames + mean.to(frames.dtype)), lengths)


class PaddingLeftBehind(Pool):
    def hidden(self, values: Tensor, lengths: Tensor) -> Embeds:
        return Embeds(values, lengths)


class NeighbourLeak(Pool):
    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        return self.hidden(self.out(frames - frames.mean((0, 1))), lengths)


class Unseeded(Pool):
    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        return self.hidden(self.out(frames + 0.01 * torch.rand(frames.shape)), lengths)


class Forgetful(Pool):
    made = 0

    def __init__(self, source: FeatureSpec, width: int) -> None:
        super().__init__(source, width)
        Forgetful.made += 1
        self.secret = torch.full((source.width,), float(Forgetful.made))

    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        return self.hidden(self.out(frames * self.secret), lengths)


class Deaf(Pool):
    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        return self.hidden(self.out(torch.zeros_like(frames)), lengths)


class FixedWidth(Pool):
    def __init__(self, source: FeatureSpec, width: int) -> None:
        super().__init__(FeatureSpec(16, 4, 50.0, 2), width)


class SinglePrecision(Pool):
    def forward(self, features: Features) -> Embeds:
        frames, lengths = self.pooled(features)
        return self.hidden(self.out(frames.float()), lengths)


class OnTheProcessor(Pool):
    def __init__(self, source: FeatureSpec, width: int) -> None:
        super().__init__(source, width)
        self.register_buffer("scale", torch.ones(4, device="cpu"))


class Catching(Pool):
    def __init__(self, source: FeatureSpec, width: int, **options: Any) -> None:
        super().__init__(source, width)


class NoJson(Pool):
    def __init__(
        self, source: FeatureSpec, width: int, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(source, width)


class Positional(Pool):
    def __init__(self, source: FeatureSpec, width: int, stride: int = 2) -> None:
        super().__init__(source, width, stride=stride)


class NoLengths(nn.Module):
    def __init__(self, source: FeatureSpec, width: int) -> None:
        super().__init__()

    def forward(self, features: Features) -> Embeds:
        raise NotImplementedError


class Frames(nn.Module):
    """A sound encoder: frames of 320 samples, a linear map, a second layer; no window."""

    sample_rate = 16_000
    frame = 320

    def __init__(self) -> None:
        super().__init__()
        self.out = FeatureSpec(8, 1, 50.0, 2)
        self.first, self.second = nn.Linear(320, 8), nn.Linear(8, 8)

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        counts = -(-lengths // self.frame)
        audio = torch.where(torch.arange(audio.shape[1]) < lengths[:, None], audio, 0)
        audio = nn.functional.pad(audio, (0, -audio.shape[1] % self.frame))
        first = self.first(audio.unflatten(1, (-1, self.frame)).to(self.first.weight.dtype))
        inside = (torch.arange(first.shape[1]) < counts[:, None])[..., None]
        states = [first, self.second(first.tanh())]
        return Features(tuple(torch.where(inside, s, 0) for s in states), counts, counts)


class WrongRate(Frames):
    def __init__(self) -> None:
        super().__init__()
        self.out = self.out._replace(rate=25.0)


class WrongLayers(Frames):
    def __init__(self) -> None:
        super().__init__()
        self.out = self.out._replace(layers=2)


class Cut(Frames):
    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        return super().forward(audio[:, :16_000], lengths.clamp(max=16_000))


class HearsPadding(Frames):
    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        found = super().forward(audio + audio.mean(1, keepdim=True), lengths)
        return found


class Levelled(Frames):
    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        return super().forward(audio / audio.abs().max(), lengths)


class SeesPadding(LLaDA):
    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        return super().forward(embeds, positions, context._replace(valid=None))


class CountsColumns(LLaDA):
    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        columns = torch.arange(embeds.shape[1]).expand(positions.shape)
        return super().forward(embeds, columns, context)


class NoMemory(LLaDA):
    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        return super().forward(embeds, positions, context._replace(kv_cache=None, positions=None))


class KeepsEverything(LLaDA):
    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        return super().forward(embeds, positions, context._replace(write=True))


class SeesBranches(LLaDA):
    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        return super().forward(embeds, positions, context._replace(branch=None, attn_mask=None))


class SeesTheFuture(Llama):
    """A causal backbone that attends to later tokens."""

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        self.transformer.attention_block = None
        return super().forward(embeds, positions, context)


class SeesNoFuture(LLaDA):
    """A masked backbone that attends to earlier tokens only."""

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        self.transformer.attention_block = 1
        return super().forward(embeds, positions, context)
