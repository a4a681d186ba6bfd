"""Conformance of adapters: lengths, padding, neighbours, and every width they may meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffa.testing.parts import ModuleSuite, close, ensure, noise
from diffa.types import Adapter, Embeds, Features, FeatureSpec

WINDOW = 48  # frames of the toy encoder's window


class AdapterSuite(ModuleSuite):
    """Checks of an adapter.

    Attributes:
        sources: encoders to sit behind.
        widths: of the backbone to feed.
        reads_padding: whether frames past a row's length, up to its extent, have a say.
        hears: whether the embeddings depend on the audio at all.
        varies: whether the content decides how many embeddings there are; ``out_lengths`` is
            then the most there can be.
    """

    kind: ClassVar[str] = "adapter"
    sources: ClassVar[Sequence[FeatureSpec]] = (
        FeatureSpec(width=16, layers=4, rate=50.0, heads=2),
        FeatureSpec(width=24, layers=2, rate=25.0, heads=3),
        FeatureSpec(width=8, layers=12, rate=12.5, heads=1),
    )
    widths: ClassVar[Sequence[int]] = (12, 20)
    reads_padding: ClassVar[bool] = False
    hears: ClassVar[bool] = True
    varies: ClassVar[bool] = False

    def new(self) -> Any:
        """The adapter behind the first source, for the first width."""
        return self.make(source=self.sources[0], width=self.widths[0])

    def run(self, part: Any) -> Tensor:
        """The embeddings of two clips."""
        return _flat(part(heard(self.sources[0], 45, 33)))

    def test_it_has_the_members_of_an_adapter(self) -> None:
        """It is an ``nn.Module`` that embeds features and knows its lengths."""
        part = self.new()
        ensure(isinstance(part, torch.nn.Module), "an adapter is an nn.Module")
        ensure(isinstance(part, Adapter), "an adapter has __call__ and out_lengths")

    @torch.no_grad()
    def test_lengths_equal_out_lengths(self) -> None:
        """Every row has as many embeddings as ``out_lengths`` says, and zeros behind them."""
        part, exact = self.new().eval(), True
        for lengths in ((45, 33, 96), (48,), (1, 47), (0, 40)):
            features = heard(self.sources[0], *lengths)
            found, told = part(features), part.out_lengths(features.lengths)
            ensure((found.lengths <= told).all(), f"{found.lengths} but told {told}")
            exact = exact and torch.equal(found.lengths, told)
            most = int(found.lengths.max())
            shape = (len(lengths), most, self.widths[0])
            ensure(tuple(found.values.shape) == shape, f"{tuple(found.values.shape)} not {shape}")
            behind = torch.arange(most) >= found.lengths[:, None]
            ensure(not found.values[behind].any(), "values past a row's length are not zero")
        ensure(exact or self.varies, "rows have fewer embeddings than out_lengths says")
        ensure(not (exact and self.varies), "varies is set, but the lengths never do: leave it out")

    def test_out_lengths_never_fall(self) -> None:
        """More frames never make fewer embeddings, and no frames make no negative number."""
        told = self.new().out_lengths(torch.arange(400))
        ensure(not told.is_floating_point(), "out_lengths returns whole numbers")
        ensure((told.diff() >= 0).all() and (told >= 0).all(), "out_lengths falls, or is negative")

    @torch.no_grad()
    def test_padding_does_not_leak(self) -> None:
        """Frames past a row's end change nothing; up to its extent where ``reads_padding``."""
        part, features = self.new().eval(), heard(self.sources[0], 33, 13, 96)
        clean = part(features).values
        beyond = _changed(features, features.extents)
        ensure(close(part(beyond).values, clean), "frames past the extent change the embeddings")
        inside = close(part(_changed(features, features.lengths)).values, clean)
        if self.reads_padding:
            ensure(not inside, "reads_padding is set, but padding changes nothing: leave it out")
        else:
            ensure(inside, "frames past a row's length change its embeddings")

    @torch.no_grad()
    def test_batch_equals_single(self) -> None:
        """A row among others, shorter and longer, is what it is alone."""
        part, lengths = self.new().eval(), (33, 13, 96, 48)
        batch = part(heard(self.sources[0], *lengths))
        for row, length in enumerate(lengths):
            alone = part(heard(self.sources[0], length))
            count = int(alone.lengths[0])
            ensure(int(batch.lengths[row]) == count, f"row {row} has another length in a batch")
            same = close(batch.values[row, :count], alone.values[0, :count])
            ensure(same, f"row {row} of {lengths} frames is not what it is alone")

    @torch.no_grad()
    def test_it_hears_the_audio(self) -> None:
        """A true frame has a say, unless ``hears`` is off."""
        part, features = self.new().eval(), heard(self.sources[0], 48)
        states = tuple(state.clone() for state in features.states)
        for state in states:  # noise, because a shift of all channels is lost in a norm
            state[:, 20:28] += noise(*state[:, 20:28].shape, seed=8)
        moved = not close(part(features._replace(states=states)).values, part(features).values)
        ensure(moved == self.hears, f"hears is {self.hears}, but the audio's say is {moved}")

    @torch.no_grad()
    def test_it_fits_every_source_and_width(self) -> None:
        """Any encoder's width, layers and heads, and any backbone's width."""
        for source in self.sources:
            for width in self.widths:
                part = self.make(source=source, width=width).eval()
                values = part(heard(source, 40, 21)).values
                ensure(values.shape[2] == width, f"{source} gives {values.shape[2]}, not {width}")
                ensure(values.isfinite().all(), f"{source} and {width} give numbers not finite")

    @torch.no_grad()
    def test_half_precision_features_are_welcome(self) -> None:
        """An encoder in bfloat16 may stand before an adapter in float32."""
        features = heard(self.sources[0], 45, 33)
        halved = features._replace(states=tuple(s.to(torch.bfloat16) for s in features.states))
        values = self.new().eval()(halved).values
        ensure(values.isfinite().all(), "bfloat16 features give numbers that are not finite")


def heard(source: FeatureSpec, *lengths: int) -> Features:
    """Features of clips of ``lengths`` frames in whole windows; content depends on length alone."""
    extents = torch.tensor([-(-max(length, 1) // WINDOW) * WINDOW for length in lengths])
    states = torch.zeros(source.layers + 1, len(lengths), int(extents.max()), source.width)
    for row, length in enumerate(lengths):
        extent = int(extents[row])
        states[:, row, :extent] = noise(source.layers + 1, extent, source.width, seed=length)
    return Features(tuple(states), torch.tensor(lengths), extents)


def _changed(features: Features, start: Tensor) -> Features:
    """The same features with other numbers in every frame from ``start`` (B,) on."""
    frames = torch.arange(features.states[0].shape[1])
    past = (frames >= start[:, None])[..., None]
    states = [torch.where(past, noise(*s.shape, seed=9) * 50, s) for s in features.states]
    return features._replace(states=tuple(states))


def _flat(embeds: Embeds) -> Tensor:
    inside = torch.arange(embeds.values.shape[1]) < embeds.lengths[:, None]
    return embeds.values[inside].flatten()
