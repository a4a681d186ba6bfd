"""Conformance of adapters: lengths, padding, batches, and all widths."""

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
        sources: Encoders to test the adapter with.
        widths: Backbone widths to test.
        reads_padding: Whether frames past a row's length, up to its extent, may change the output.
        uses_audio: Whether the embeddings depend on the audio.
        varies: Whether the number of embeddings depends on the content. ``out_lengths`` is then an
            upper bound.
    """

    kind: ClassVar[str] = "adapter"
    sources: ClassVar[Sequence[FeatureSpec]] = (
        FeatureSpec(width=16, layers=4, rate=50.0, heads=2),
        FeatureSpec(width=24, layers=2, rate=25.0, heads=3),
        FeatureSpec(width=8, layers=12, rate=12.5, heads=1),
    )
    widths: ClassVar[Sequence[int]] = (12, 20)
    reads_padding: ClassVar[bool] = False
    uses_audio: ClassVar[bool] = True
    varies: ClassVar[bool] = False

    def new(self) -> Any:
        """Build the adapter for the first source and the first width."""
        return self.make(source=self.sources[0], width=self.widths[0])

    def run(self, part: Any) -> Tensor:
        """Return the embeddings of two clips."""
        return _flat(part(toy_features(self.sources[0], 45, 33)))

    def test_it_has_the_members_of_an_adapter(self) -> None:
        """The adapter is an ``nn.Module`` with ``__call__`` and ``out_lengths``."""
        part = self.new()
        ensure(isinstance(part, torch.nn.Module), "an adapter is an nn.Module")
        ensure(isinstance(part, Adapter), "an adapter has __call__ and out_lengths")

    @torch.no_grad()
    def test_lengths_equal_out_lengths(self) -> None:
        """Every row has ``out_lengths`` embeddings, and zeros after them."""
        part, exact = self.new().eval(), True
        for lengths in ((45, 33, 96), (48,), (1, 47), (0, 40)):
            features = toy_features(self.sources[0], *lengths)
            embeds, expected = part(features), part.out_lengths(features.lengths)
            ensure((embeds.lengths <= expected).all(), f"{embeds.lengths}, out_lengths {expected}")
            exact = exact and torch.equal(embeds.lengths, expected)
            longest = int(embeds.lengths.max())
            shape = (len(lengths), longest, self.widths[0])
            ensure(tuple(embeds.values.shape) == shape, f"{tuple(embeds.values.shape)} not {shape}")
            padding = torch.arange(longest) >= embeds.lengths[:, None]
            ensure(not embeds.values[padding].any(), "values past a row's length are not zero")
        ensure(
            exact or self.varies,
            "rows have fewer embeddings than out_lengths: set varies if that is intended",
        )
        ensure(
            not (exact and self.varies),
            "varies is set, but lengths always equal out_lengths: remove it",
        )

    def test_out_lengths_never_fall(self) -> None:
        """More frames never give fewer embeddings, and no length is negative."""
        lengths = self.new().out_lengths(torch.arange(400))
        ensure(not lengths.is_floating_point(), "out_lengths must return integers")
        ensure(
            (lengths.diff() >= 0).all() and (lengths >= 0).all(), "out_lengths falls or is negative"
        )

    @torch.no_grad()
    def test_padding_does_not_leak(self) -> None:
        """Frames past a row's length change nothing; with ``reads_padding``, past its extent."""
        part, features = self.new().eval(), toy_features(self.sources[0], 33, 13, 96)
        clean = part(features).values
        beyond = _changed(features, features.extents)
        ensure(close(part(beyond).values, clean), "frames past the extent change the embeddings")
        inside = close(part(_changed(features, features.lengths)).values, clean)
        if self.reads_padding:
            ensure(not inside, "reads_padding is set, but padding changes nothing: remove it")
        else:
            ensure(inside, "frames past a row's length change its embeddings")

    @torch.no_grad()
    def test_batch_equals_single(self) -> None:
        """A row has the same embeddings in a batch and alone."""
        part, lengths = self.new().eval(), (33, 13, 96, 48)
        batch = part(toy_features(self.sources[0], *lengths))
        for row, length in enumerate(lengths):
            alone = part(toy_features(self.sources[0], length))
            count = int(alone.lengths[0])
            ensure(int(batch.lengths[row]) == count, f"row {row} has another length in a batch")
            same = close(batch.values[row, :count], alone.values[0, :count])
            ensure(same, f"row {row} of {lengths} frames differs when it is alone")

    @torch.no_grad()
    def test_it_hears_the_audio(self) -> None:
        """The audio changes the embeddings, unless ``uses_audio`` is False."""
        part, features = self.new().eval(), toy_features(self.sources[0], 48)
        states = tuple(state.clone() for state in features.states)
        for state in states:  # noise: a norm would remove a constant shift
            state[:, 20:28] += noise(*state[:, 20:28].shape, seed=8)
        moved = not close(part(features._replace(states=states)).values, part(features).values)
        ensure(
            moved == self.uses_audio,
            f"uses_audio is {self.uses_audio}, but audio changes the embeddings: {moved}",
        )

    @torch.no_grad()
    def test_it_fits_every_source_and_width(self) -> None:
        """The adapter works with any encoder's shape and any backbone's width."""
        for source in self.sources:
            for width in self.widths:
                part = self.make(source=source, width=width).eval()
                values = part(toy_features(source, 40, 21)).values
                ensure(values.shape[2] == width, f"{source} gives {values.shape[2]}, not {width}")
                ensure(
                    values.isfinite().all(), f"{source} and {width} give values that are not finite"
                )

    @torch.no_grad()
    def test_half_precision_features_are_accepted(self) -> None:
        """A float32 adapter accepts bfloat16 features."""
        features = toy_features(self.sources[0], 45, 33)
        halved = features._replace(states=tuple(s.to(torch.bfloat16) for s in features.states))
        values = self.new().eval()(halved).values
        ensure(values.isfinite().all(), "bfloat16 features give values that are not finite")


def toy_features(source: FeatureSpec, *lengths: int) -> Features:
    """Return features of clips of ``lengths`` frames in whole windows; equal lengths are equal."""
    extents = torch.tensor([-(-max(length, 1) // WINDOW) * WINDOW for length in lengths])
    states = torch.zeros(source.layers + 1, len(lengths), int(extents.max()), source.width)
    for row, length in enumerate(lengths):
        extent = int(extents[row])
        states[:, row, :extent] = noise(source.layers + 1, extent, source.width, seed=length)
    return Features(tuple(states), torch.tensor(lengths), extents)


def _changed(features: Features, start: Tensor) -> Features:
    """Replace every frame from ``start`` (B,) on by noise."""
    frames = torch.arange(features.states[0].shape[1])
    past = (frames >= start[:, None])[..., None]
    states = [torch.where(past, noise(*s.shape, seed=9) * 50, s) for s in features.states]
    return features._replace(states=tuple(states))


def _flat(embeds: Embeds) -> Tensor:
    inside = torch.arange(embeds.values.shape[1]) < embeds.lengths[:, None]
    return embeds.values[inside].flatten()
