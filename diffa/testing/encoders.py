"""Conformance of encoders: output as declared, for audio of any length."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffa.runtime.imports import imports_on_cpu
from diffa.testing.parts import ModuleSuite, close, ensure, noise
from diffa.types import Encoder, Features


class EncoderSuite(ModuleSuite):
    """Checks of an encoder.

    Attributes:
        seconds: Length of the test clips.
    """

    kind: ClassVar[str] = "encoder"
    seconds: ClassVar[float] = 1.0

    def new(self) -> Any:
        """Build the encoder."""
        return self.make()

    def run(self, part: Any) -> Tensor:
        """Return all states of a clip's real frames."""
        features = part(*_batch(self.clip(part)))
        count = int(features.lengths[0])
        return torch.cat([state[0, :count].flatten() for state in features.states])

    def clip(self, part: Any, share: float = 1.0, seed: int = 0) -> Tensor:
        """Return noise (S,) of ``share`` times ``seconds``."""
        return 0.1 * noise(max(1, int(share * self.seconds * part.sample_rate)), seed=seed)

    def test_it_declares_what_an_encoder_declares(self) -> None:
        """The sample rate and ``out`` are valid, on the meta device too."""
        part = self.new()
        ensure(
            isinstance(part, torch.nn.Module) and isinstance(part, Encoder),
            "not an Encoder that is an nn.Module",
        )
        ensure(type(part.sample_rate) is int and part.sample_rate > 0, "sample_rate is an int")
        ensure(min(part.out) > 0, f"{part.out} holds a number that is not above 0")
        ensure(part.out.width % part.out.heads == 0, "the width is not a multiple of the heads")
        with torch.device("meta"), imports_on_cpu():
            ensure(self.new().out == part.out, "on the meta device `out` differs")

    @torch.no_grad()
    def test_it_emits_what_it_declares(self) -> None:
        """There are ``layers + 1`` states of the declared width, with zeros past the extents."""
        part = self.new().eval()
        features = part(*_batch(self.clip(part), self.clip(part, 0.4)))
        ensure(len(features.states) == part.out.layers + 1, f"{len(features.states)} states")
        shapes = {tuple(state.shape) for state in features.states}
        ensure(len(shapes) == 1, f"states of several shapes: {shapes}")
        rows, frames, width = shapes.pop()
        ensure((rows, width) == (2, part.out.width), f"{rows} rows of width {width}")
        ensure((features.lengths <= features.extents).all(), "lengths reach past extents")
        ensure(int(features.extents.max()) <= frames, "extents reach past the states")
        padding = torch.arange(frames) >= features.extents[:, None]
        for state in features.states:
            ensure(not state[padding].any(), "frames past the extents are not zero")
            ensure(state.isfinite().all(), "states are not finite")

    @torch.no_grad()
    def test_frames_come_at_the_declared_rate(self) -> None:
        """The number of frames is seconds times ``out.rate`` to within one, and never falls."""
        part, counts = self.new().eval(), []
        for share in (0.1, 0.33, 0.5, 1.0):
            wave = self.clip(part, share)
            counts.append(int(part(*_batch(wave)).lengths[0]))
            expected = len(wave) / part.sample_rate * part.out.rate
            ensure(abs(counts[-1] - expected) <= 1, f"{counts[-1]} frames of {len(wave)} samples")
        ensure(counts == sorted(counts), f"more audio gives fewer frames: {counts}")

    @torch.no_grad()
    def test_padding_does_not_leak(self) -> None:
        """Samples past a row's length change nothing."""
        part = self.new().eval()
        audio, lengths = _batch(self.clip(part), self.clip(part, 0.4, seed=1))
        clean, dirty = part(audio, lengths), audio.clone()
        dirty[1, int(lengths[1]) :] = 0.3
        ensure(_same(part(dirty, lengths), clean), "samples past a row's length change its states")

    @torch.no_grad()
    def test_batch_equals_single(self) -> None:
        """A row is the same alone and beside rows that are louder, shorter or longer."""
        part = self.new().eval()
        waves = [self.clip(part, 0.4), 5 * self.clip(part, seed=1), self.long(part, seed=2)]
        batch = part(*_batch(*waves))
        for row, wave in enumerate(waves):
            alone = part(*_batch(wave))
            extent = int(alone.extents[0])
            ensure(
                int(batch.lengths[row]) == int(alone.lengths[0]),
                f"row {row} has another length alone",
            )
            ensure(int(batch.extents[row]) == extent, f"row {row} has another extent alone")
            for mixed, lone in zip(batch.states, alone.states, strict=True):
                same = close(mixed[row, :extent], lone[0, :extent], 1e-3)
                ensure(same, f"row {row} differs when it is alone")

    def long(self, part: Any, seed: int = 0) -> Tensor:
        """Return noise (S,) 1.5 times as long as the window, or as ``seconds``."""
        window = int(part(*_batch(self.clip(part, 0.1))).extents[0]) / part.out.rate
        return self.clip(part, 1.5 * max(window, self.seconds) / self.seconds, seed)

    @torch.no_grad()
    def test_audio_longer_than_a_window_is_read_to_its_end(self) -> None:
        """Long audio has all its frames, and its end changes the last of them."""
        part = self.new().eval()
        wave = self.long(part)
        features, expected = part(*_batch(wave)), len(wave) / part.sample_rate * part.out.rate
        count = int(features.lengths[0])
        ensure(abs(count - expected) <= 2, f"{count} frames instead of {expected:.0f}")
        other = wave.clone()
        other[-len(wave) // 10 :] = self.clip(part, 20.0, seed=5)[: len(wave)][-len(wave) // 10 :]
        changed = part(*_batch(other)).states[-1][0, count - 1]
        ensure(
            not close(changed, features.states[-1][0, count - 1]),
            "the end of long audio is ignored",
        )

    @torch.no_grad()
    def test_silence_and_a_single_sample_give_finite_states(self) -> None:
        """States are finite for silence and for one sample."""
        part = self.new().eval()
        for wave in (torch.zeros(part.sample_rate // 5), torch.full((1,), 0.1)):
            states = part(*_batch(wave)).states
            ensure(all(state.isfinite().all() for state in states), "states are not finite")


def _batch(*waves: Tensor) -> tuple[Tensor, Tensor]:
    """Pad waveforms (S,) to a batch (B, S) with lengths (B,)."""
    lengths = torch.tensor([len(wave) for wave in waves])
    return torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True), lengths


def _same(features: Features, expected: Features) -> bool:
    if features.lengths.tolist() != expected.lengths.tolist():
        return False
    pairs = zip(features.states, expected.states, strict=True)
    return all(close(one, other, 1e-3) for one, other in pairs)
