"""Utterances: scenes rendered as sound; each follows from (seed, index) alone."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffa.nano.corpus.recordings import Recordings, Split, Voice, fsdd_folder
from diffa.nano.corpus.scenes import (
    LEVELS,
    SPEEDS,
    Labels,
    Rng,
    Scene,
    audible_accents,
    draw_scene,
    speed_band,
)
from diffa.nano.corpus.shaping import RATE, Wave, at_level, decibels, fade, stretch
from diffa.nano.corpus.sounds import SOUNDS, render_melody
from diffa.nano.corpus.voices import EspeakVoices

MAX_SECONDS = 7.8  # seconds; the encoder's window is 8


class Utterance(NamedTuple):
    """A waveform at 16 kHz and what is audible in it."""

    audio: Wave
    labels: Labels


class Utterances:
    """Random access to the composed utterances of one split and seed.

    The first ``cached_utterances`` that are read stay in memory.
    """

    def __init__(
        self,
        split: Split,
        seed: int,
        fsdd: str | Path | None = None,
        exclude_speakers: tuple[str, ...] = (),
        synthetic_voices: bool = True,
        max_digits: int = 8,
        cached_utterances: int = 0,
    ) -> None:
        self.seed, self.max_digits, self.cached_utterances = seed, max_digits, cached_utterances
        self._cache: dict[tuple[int, int], Utterance] = {}
        self.recordings = Recordings(fsdd_folder(fsdd), split, exclude_speakers)
        self.espeak = EspeakVoices(split)
        self.voices = self.recordings.voices + (self.espeak.voices if synthetic_voices else [])

    def scene(self, index: int) -> Scene:
        """Return the plan of utterance ``index``."""
        return draw_scene(np.random.default_rng((self.seed, index)), self.voices, self.max_digits)

    def __getitem__(self, index: int) -> Utterance:
        cached = self._cache.get((index, self.max_digits))
        if cached is not None:
            return cached
        rng = np.random.default_rng((self.seed, index))
        scene = draw_scene(rng, self.voices, self.max_digits)
        utterance = self.render(scene, rng)
        if len(self._cache) < self.cached_utterances:
            self._cache[index, self.max_digits] = utterance
        return utterance

    def render(self, scene: Scene, rng: Rng) -> Utterance:
        """Render a scene as sound, with its digits' boundaries and audible labels."""
        utterance = self._render_speech(scene, rng) if scene.digits else _render_sound(scene, rng)
        wave = utterance.audio
        if rng.random() < 0.5:  # a room's noise floor, in half of the utterances
            floor = rng.standard_normal(len(wave), dtype=np.float32)
            wave = wave + floor * np.float32(10 ** (rng.uniform(-75, -60) / 20))
        return Utterance(np.clip(wave, -1, 1), utterance.labels)

    def _render_speech(self, scene: Scene, rng: Rng) -> Utterance:
        period = 1 / rng.uniform(*_onset_rates(scene)) if scene.speed else None
        pieces, spans = self._place_digits(scene, period, rng)
        count = len(spans)
        digits, voices = scene.digits[:count], scene.voices[:count]
        wave = np.concatenate(pieces)
        if scene.sound:
            wave = wave + _background(scene, len(wave), rng) * 10 ** (_loudness(wave, spans) / 20)
        low, high = LEVELS[scene.loudness] if scene.loudness else (-42.0, -14.0)
        gain = rng.uniform(low + 1, high - 1) - _loudness(wave, spans)
        labels = Labels(
            digits, spans, tuple(v.name for v in voices), tuple(v.gender for v in voices),
            audible_accents(digits, voices), speed_band([start for start, _ in spans]),
            scene.loudness, scene.sound, None, len(wave) / RATE,
        )  # fmt: skip
        return Utterance(np.asarray(wave * 10 ** (gain / 20), dtype=np.float32), labels)

    def _place_digits(
        self, scene: Scene, period: float | None, rng: Rng
    ) -> tuple[list[Wave], tuple[tuple[float, float], ...]]:
        """Join the digits with pauses between; leave out those that do not fit."""
        pieces = [np.zeros(int(rng.uniform(0.05, 0.5) * RATE), dtype=np.float32)]
        at = len(pieces[0])
        spans: list[tuple[float, float]] = []
        for digit, voice in zip(scene.digits, scene.voices, strict=True):
            wave = self._render_digit(voice, digit, period, scene.loudness is None, rng)
            gap = period - len(wave) / RATE if period else rng.uniform(0.02, 0.5)
            pause = int(max(gap + rng.uniform(-0.02, 0.02), 0.01) * RATE)
            if at + len(wave) > MAX_SECONDS * RATE and spans:
                break
            spans.append((at / RATE, (at + len(wave)) / RATE))
            pieces += [wave, np.zeros(pause, dtype=np.float32)]
            at += len(wave) + pause
        tail = int(min(rng.uniform(0.05, 0.5), max(MAX_SECONDS - spans[-1][1], 0.02)) * RATE)
        pieces[-1] = np.zeros(tail, dtype=np.float32)
        return pieces, tuple(spans)

    def _render_digit(
        self, voice: Voice, digit: int, period: float | None, uneven: bool, rng: Rng
    ) -> Wave:
        """Render one digit at its tempo and level."""
        source = self.recordings if voice.real else self.espeak
        wave = source.take(voice, digit, rng.random())
        seconds = len(wave) / RATE
        tempo = rng.uniform(0.9, 1.15)
        if period:  # slow speech drawls a little; fast speech is pressed into its period
            tempo = max(seconds / (0.93 * period), rng.uniform(0.78, 0.9) if period > 0.7 else 1.0)
        wave = stretch(wave[: int(1.2 * RATE)], min(tempo, 1.9))
        return at_level(wave, rng.uniform(-9, 9) if uneven else rng.uniform(-1.5, 1.5))


def _onset_rates(scene: Scene) -> tuple[float, float]:
    """Return onset rates inside the speed band; eight slow digits must fit the window."""
    aims = {
        "slow": (1.0 if len(scene.digits) < 6 else 1.2, 1.33),
        "medium": (1.7, 2.1),
        "fast": (2.6, 3.3),
    }
    low, high = aims[str(scene.speed)]
    assert scene.speed and SPEEDS[scene.speed][0] <= low <= high <= SPEEDS[scene.speed][1]
    return low, high


def _loudness(wave: Wave, spans: tuple[tuple[float, float], ...]) -> float:
    return decibels(
        np.concatenate([wave[int(start * RATE) : int(stop * RATE)] for start, stop in spans])
    )


def _background(scene: Scene, length: int, rng: Rng) -> Wave:
    """Render a sound under the whole utterance, 10 to 18 dB below its speech."""
    if scene.melody:
        once = np.concatenate(
            [render_melody(scene.melody, rng), np.zeros(int(0.3 * RATE), dtype=np.float32)]
        )
        wave = np.tile(once, length // len(once) + 1)[:length]
    else:
        wave = SOUNDS[str(scene.sound)](length / RATE + 0.01, rng)[:length]
    return at_level(wave, rng.uniform(-18, -10))


def _render_sound(scene: Scene, rng: Rng) -> Utterance:
    """Render a sound or a melody alone between two short silences."""
    wave = (
        render_melody(scene.melody, rng)
        if scene.melody
        else SOUNDS[str(scene.sound)](rng.uniform(1.0, 3.0), rng)
    )
    if scene.loudness:
        wave = at_level(fade(wave), rng.uniform(*LEVELS[scene.loudness]))
    before, after = (
        np.zeros(int(rng.uniform(0.05, 0.4) * RATE), dtype=np.float32) for _ in range(2)
    )
    wave = np.concatenate([before, wave, after])
    labels = Labels(
        (), (), (), (), (), None, scene.loudness, scene.sound, scene.melody, len(wave) / RATE
    )
    return Utterance(wave, labels)
