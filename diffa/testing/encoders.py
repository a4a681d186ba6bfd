"""Conformance of encoders: what they declare is what they emit, for audio of any length."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffa.testing.parts import ModuleSuite, close, ensure, noise
from diffa.types import Encoder, Features


class EncoderSuite(ModuleSuite):
    """Checks of an encoder.

    Attributes:
        seconds: length of the clips it is tried on.
    """

    kind: ClassVar[str] = "encoder"
    seconds: ClassVar[float] = 1.0

    def new(self) -> Any:
        """The encoder; it has no wires."""
        return self.make()

    def run(self, part: Any) -> Tensor:
        """Every state of a clip's true frames."""
        features = part(*_batch(self.clip(part)))
        count = int(features.lengths[0])
        return torch.cat([state[0, :count].flatten() for state in features.states])

    def clip(self, part: Any, share: float = 1.0, seed: int = 0) -> Tensor:
        """Noise (S,) that lasts ``share`` times ``seconds``."""
        return 0.1 * noise(max(1, int(share * self.seconds * part.sample_rate)), seed=seed)

    def test_it_declares_what_an_encoder_declares(self) -> None:
        """A sample rate, and a width, layers, rate and heads that are possible."""
        part = self.new()
        ensure(isinstance(part, torch.nn.Module) and isinstance(part, Encoder), "no encoder")
        ensure(type(part.sample_rate) is int and part.sample_rate > 0, "sample_rate is an int")
        ensure(min(part.out) > 0, f"{part.out} holds a number that is not above 0")
        ensure(part.out.width % part.out.heads == 0, "the width is not a multiple of the heads")
        with torch.device("meta"):
            ensure(self.new().out == part.out, "a dry run declares something else")

    @torch.no_grad()
    def test_it_emits_what_it_declares(self) -> None:
        """``layers + 1`` states of the declared width; lengths within extents; zeros behind."""
        part = self.new().eval()
        features = part(*_batch(self.clip(part), self.clip(part, 0.4)))
        ensure(len(features.states) == part.out.layers + 1, f"{len(features.states)} states")
        shapes = {tuple(state.shape) for state in features.states}
        ensure(len(shapes) == 1, f"states of several shapes: {shapes}")
        rows, frames, width = shapes.pop()
        ensure((rows, width) == (2, part.out.width), f"{rows} rows of width {width}")
        ensure((features.lengths <= features.extents).all(), "lengths reach past extents")
        ensure(int(features.extents.max()) <= frames, "extents reach past the states")
        behind = torch.arange(frames) >= features.extents[:, None]
        for state in features.states:
            ensure(not state[behind].any(), "frames past the extents are not zero")
            ensure(state.isfinite().all(), "states are not finite")

    @torch.no_grad()
    def test_frames_come_at_the_declared_rate(self) -> None:
        """Seconds times ``out.rate`` is the number of frames, to one; more audio, no fewer."""
        part, counts = self.new().eval(), []
        for share in (0.1, 0.33, 0.5, 1.0):
            wave = self.clip(part, share)
            counts.append(int(part(*_batch(wave)).lengths[0]))
            due = len(wave) / part.sample_rate * part.out.rate
            ensure(abs(counts[-1] - due) <= 1, f"{counts[-1]} frames of {len(wave)} samples")
        ensure(counts == sorted(counts), f"more audio gives fewer frames: {counts}")

    @torch.no_grad()
    def test_padding_does_not_leak(self) -> None:
        """Samples past a row's length change nothing."""
        part = self.new().eval()
        audio, lengths = _batch(self.clip(part), self.clip(part, 0.4, seed=1))
        clean, dirty = part(audio, lengths), audio.clone()
        dirty[1, int(lengths[1]) :] = 0.3
        ensure(_same(part(dirty, lengths), clean), "samples past a row's length have a say")

    @torch.no_grad()
    def test_batch_equals_single(self) -> None:
        """A row beside others, louder, shorter and longer than a window, is what it is alone."""
        part = self.new().eval()
        waves = [self.clip(part, 0.4), 5 * self.clip(part, seed=1), self.long(part, seed=2)]
        batch = part(*_batch(*waves))
        for row, wave in enumerate(waves):
            alone = part(*_batch(wave))
            extent = int(alone.extents[0])
            ensure(int(batch.lengths[row]) == int(alone.lengths[0]), f"row {row}: other lengths")
            ensure(int(batch.extents[row]) == extent, f"row {row}: other extents")
            for ours, lone in zip(batch.states, alone.states, strict=True):
                same = close(ours[row, :extent], lone[0, :extent], 1e-3)
                ensure(same, f"row {row} is not what it is alone")

    def long(self, part: Any, seed: int = 0) -> Tensor:
        """Noise (S,) half as long again as the window, or as ``seconds`` where there is none."""
        window = int(part(*_batch(self.clip(part, 0.1))).extents[0]) / part.out.rate
        return self.clip(part, 1.5 * max(window, self.seconds) / self.seconds, seed)

    @torch.no_grad()
    def test_audio_longer_than_a_window_is_read_to_its_end(self) -> None:
        """Long audio has all its frames, and its last tenth has a say in the last of them."""
        part = self.new().eval()
        wave = self.long(part)
        features, due = part(*_batch(wave)), len(wave) / part.sample_rate * part.out.rate
        count = int(features.lengths[0])
        ensure(abs(count - due) <= 2, f"{count} frames where {due:.0f} are due")
        other = wave.clone()
        other[-len(wave) // 10 :] = self.clip(part, 20.0, seed=5)[: len(wave)][-len(wave) // 10 :]
        changed = part(*_batch(other)).states[-1][0, count - 1]
        ensure(not close(changed, features.states[-1][0, count - 1]), "the end is not heard")

    @torch.no_grad()
    def test_silence_and_a_single_sample_give_finite_states(self) -> None:
        """Nothing divides by the loudness or the length of a clip."""
        part = self.new().eval()
        for wave in (torch.zeros(part.sample_rate // 5), torch.full((1,), 0.1)):
            states = part(*_batch(wave)).states
            ensure(all(state.isfinite().all() for state in states), "states are not finite")


def _batch(*waves: Tensor) -> tuple[Tensor, Tensor]:
    """Waveforms (S,) as one batch (B, S) with lengths (B,)."""
    lengths = torch.tensor([len(wave) for wave in waves])
    return torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True), lengths


def _same(found: Features, expected: Features) -> bool:
    if found.lengths.tolist() != expected.lengths.tolist():
        return False
    pairs = zip(found.states, expected.states, strict=True)
    return all(close(one, other, 1e-3) for one, other in pairs)
