"""Procedural sounds and short melodies at 16 kHz."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from diffa.nano.corpus.shaping import RATE, Wave, fade

Rng = np.random.Generator
Direction = Literal["rising", "falling", "level", "mixed"]
DIRECTIONS: tuple[Direction, ...] = ("rising", "falling", "level", "mixed")
NOTES = range(3, 7)


class Melody(NamedTuple):
    """A few notes: where they go, and how many there are."""

    direction: Direction
    notes: int


def tone(seconds: float, rng: Rng) -> Wave:
    """Return a steady sine between 250 and 2500 Hz."""
    time = np.arange(int(seconds * RATE)) / RATE
    return _float32(np.sin(2 * np.pi * _pitch(rng, 250, 2500) * time))


def chirp(seconds: float, rng: Rng) -> Wave:
    """Return glides over two octaves, up or down, of 0.4 to 0.8 s each."""
    low, count = _pitch(rng, 250, 700), int(seconds * RATE)
    period = rng.uniform(0.4, 0.8)
    phase = (np.arange(count) / RATE / period) % 1.0
    octaves = 2 * (phase if rng.random() < 0.5 else 1 - phase)
    return _float32(np.sin(2 * np.pi * np.cumsum(low * 2**octaves) / RATE))


def noise(seconds: float, rng: Rng) -> Wave:
    """Return white noise."""
    return _float32(rng.standard_normal(int(seconds * RATE)))


def clicks(seconds: float, rng: Rng) -> Wave:
    """Return a regular train of 4 to 10 short clicks per second."""
    wave = np.zeros(int(seconds * RATE))
    click = np.exp(-np.arange(160) / 25) * rng.choice([-1.0, 1.0], 160)
    for start in range(0, len(wave) - 160, int(RATE / rng.uniform(4, 10))):
        wave[start : start + 160] += click
    return _float32(wave)


def silence(seconds: float, rng: Rng) -> Wave:
    """Return silence."""
    return np.zeros(int(seconds * RATE), dtype=np.float32)


SOUNDS: dict[str, Callable[[float, Rng], Wave]] = {
    "tone": tone,
    "chirp": chirp,
    "noise": noise,
    "clicks": clicks,
    "silence": silence,
}


def draw_melody(rng: Rng) -> Melody:
    """Draw a direction and a number of notes."""
    direction = DIRECTIONS[int(rng.integers(len(DIRECTIONS)))]
    return Melody(direction, int(rng.choice(NOTES)))


def render_melody(melody: Melody, rng: Rng) -> Wave:
    """Render notes of 0.18 to 0.3 s with short rests and steps of 2 to 4 semitones."""
    length, rest = rng.uniform(0.18, 0.30), rng.uniform(0.06, 0.12)
    steps = rng.integers(2, 5, melody.notes - 1) * _step_signs(melody, rng)
    pitches = np.concatenate([[0], np.cumsum(steps)])
    middle = _pitch(rng, 350, 600)
    time = np.arange(int(length * RATE)) / RATE
    pause = np.zeros(int(rest * RATE), dtype=np.float32)
    notes: list[Wave] = []
    for pitch in middle * 2 ** ((pitches - pitches.mean()) / 12):
        harmonics = sum(np.sin(2 * np.pi * pitch * k * time) / k**1.5 for k in (1, 2, 3))
        notes += [fade(_float32(harmonics * np.exp(-2 * time))), pause]
    return np.concatenate(notes[:-1])


def _step_signs(melody: Melody, rng: Rng) -> np.ndarray:
    """Return the sign of each step between notes; alternating for mixed melodies."""
    ways = {"rising": 1, "falling": -1, "level": 0}
    if melody.direction in ways:
        return np.full(melody.notes - 1, ways[melody.direction])
    turns = np.where(np.arange(melody.notes - 1) % 2 == 0, 1, -1)
    return turns if rng.random() < 0.5 else -turns


def _pitch(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _float32(samples: object) -> Wave:
    return np.asarray(samples, dtype=np.float32)
