"""Plans of utterances, drawn from (seed, index) alone, and the labels that are audible."""

from typing import Literal, NamedTuple

import numpy as np

from diffa.nano.corpus.recordings import Voice
from diffa.nano.corpus.sounds import SOUNDS, Melody, draw_melody
from diffa.nano.corpus.voices import accent_is_audible

Rng = np.random.Generator
Speed = Literal["slow", "medium", "fast"]
Loudness = Literal["quiet", "normal", "loud"]
# Digits per second from one onset to the next; between the bands speed has no name.
SPEEDS: dict[Speed, tuple[float, float]] = {
    "slow": (0.8, 1.4),
    "medium": (1.6, 2.2),
    "fast": (2.5, 4.5),
}
# Root mean square of what sounds, in dB below full scale; the classes lie 6 dB or more apart.
LEVELS: dict[Loudness, tuple[float, float]] = {
    "quiet": (-44, -36),
    "normal": (-30, -24),
    "loud": (-18, -13),
}
BACKGROUNDS = ("tone", "chirp", "noise", "clicks", "melody")


class Scene(NamedTuple):
    """The plan of an utterance, before anything sounds."""

    digits: tuple[int, ...]
    voices: tuple[Voice, ...]  # one per digit
    speed: Speed | None  # None: irregular pauses
    loudness: Loudness | None  # None: digits of uneven level
    sound: str | None  # alone where there are no digits, else behind the speech
    melody: Melody | None


class Labels(NamedTuple):
    """The audible labels; a field is None (or empty) if it is not audible.

    speed: digits per second between the first and the last onset, in bands (SPEEDS).
    loudness: root mean square level of speech, or of a sound alone, in bands (LEVELS).
    accents: per digit; a synthetic accent counts only if its digits tell it from the others.
    """

    digits: tuple[int, ...]
    spans: tuple[tuple[float, float], ...]  # start and end of each digit in seconds
    speakers: tuple[str, ...]
    genders: tuple[str, ...]
    accents: tuple[str | None, ...]
    speed: Speed | None
    loudness: Loudness | None
    sound: str | None
    melody: Melody | None  # only where it sounds alone
    duration: float

    @property
    def voices(self) -> int:
        """Return how many people speak."""
        return len(set(self.speakers))


def draw_scene(rng: Rng, voices: list[Voice], max_digits: int = 8) -> Scene:
    """Draw a scene with at most ``max_digits`` digits."""
    kind = rng.choice(["speech", "behind", "sound", "melody"], p=[0.56, 0.18, 0.1, 0.16])
    loudness = list(LEVELS)[int(rng.integers(3))]
    if kind == "melody":
        return Scene((), (), None, loudness, "melody", draw_melody(rng))
    if kind == "sound":
        sound = list(SOUNDS)[int(rng.integers(len(SOUNDS)))]
        return Scene((), (), None, None if sound == "silence" else loudness, sound, None)
    count = int(rng.integers(1, max_digits + 1))
    digits = tuple(int(digit) for digit in rng.integers(0, 10, count))
    behind = str(rng.choice(BACKGROUNDS)) if kind == "behind" else None
    speed = list(SPEEDS)[int(rng.integers(3))] if rng.random() < 0.8 else None
    even = loudness if rng.random() < 0.85 else None
    melody = draw_melody(rng) if behind == "melody" else None
    return Scene(
        digits, _assign_voices(rng, voices, count, behind is None), speed, even, behind, melody
    )


def _assign_voices(rng: Rng, voices: list[Voice], count: int, duet: bool) -> tuple[Voice, ...]:
    """Draw one speaker, or two in turn (for at most 7 digits, to keep captions short)."""
    first, second = _draw_voice(rng, voices), _draw_voice(rng, voices)
    if not duet or count < 2 or count > 7 or rng.random() < 0.7 or not _distinct(first, second):
        return (first,) * count
    turn = int(rng.integers(1, count))
    return (first,) * turn + (second,) * (count - turn)


def _draw_voice(rng: Rng, voices: list[Voice]) -> Voice:
    """Draw a real person in half of the cases, a synthetic voice otherwise."""
    real = [voice for voice in voices if voice.real] or voices
    synthetic = [voice for voice in voices if not voice.real] or voices
    pool = real if rng.random() < 0.5 else synthetic
    return pool[int(rng.integers(len(pool)))]


def _distinct(one: Voice, other: Voice) -> bool:
    """Return whether two voices sound different: both real, or of different gender."""
    return one.name != other.name and ((one.real and other.real) or one.gender != other.gender)


def audible_accents(digits: tuple[int, ...], voices: tuple[Voice, ...]) -> tuple[str | None, ...]:
    """Return the accent of each digit's speaker; None if the speaker's digits do not reveal it."""
    spoken_digits = {
        voice: tuple(d for d, v in zip(digits, voices, strict=True) if v == voice)
        for voice in set(voices)
    }
    accents = {
        v: v.accent if v.real or accent_is_audible(v.accent, spoken_digits[v]) else None
        for v in spoken_digits
    }
    return tuple(accents[voice] for voice in voices)


def speed_band(onsets: list[float]) -> Speed | None:
    """Return the band of the rate between the first and last onset, or None between bands."""
    if len(onsets) < 2:
        return None
    rate = (len(onsets) - 1) / (onsets[-1] - onsets[0])
    return next((name for name, (low, high) in SPEEDS.items() if low <= rate <= high), None)


def scene_labels(scene: Scene) -> Labels:
    """Return the labels of a scene that is not rendered, for training on text."""
    accents = audible_accents(scene.digits, scene.voices)
    names = tuple(voice.name for voice in scene.voices)
    genders = tuple(voice.gender for voice in scene.voices)
    speed = scene.speed if len(scene.digits) > 1 else None
    melody = None if scene.digits else scene.melody
    spans = tuple((float(i), i + 0.5) for i in range(len(scene.digits)))
    return Labels(
        scene.digits,
        spans,
        names,
        genders,
        accents,
        speed,
        scene.loudness,
        scene.sound,
        melody,
        0.0,
    )
