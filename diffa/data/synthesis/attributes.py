"""Describe a recording by ten attributes, and write them as one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from diffa.data.corpora.clips import ATTRIBUTES
from diffa.data.synthesis.measures import Measures

TITLES = {
    "gender": "Gender",
    "age": "Age",
    "accent": "Accent",
    "emotion": "Emotion",
    "pitch": "Pitch",
    "volume": "Volume",
    "speed": "Speaking speed",
    "duration": "Duration",
    "intent": "Intent",
}


class Bands(NamedTuple):
    """Where a measure's words change: below the first number, between the two, above the second.

    The paper gives no thresholds; these are this library's, and a manifest keeps the numbers too.

    Attributes:
        man, woman, anyone: pitch in Hz, by the speaker's gender where it is known.
        volume: dB below full scale.
        speed: syllables per second, pauses included.
    """

    man: tuple[float, float] = (105.0, 145.0)
    woman: tuple[float, float] = (175.0, 220.0)
    anyone: tuple[float, float] = (125.0, 190.0)
    volume: tuple[float, float] = (-33.0, -21.0)
    speed: tuple[float, float] = (2.8, 4.4)


def band_word(value: float | None, band: tuple[float, float], words: tuple[str, str, str]) -> str:
    """Name the band that a value lies in; nothing for None."""
    if value is None:
        return ""
    return words[0] if value < band[0] else words[2] if value > band[1] else words[1]


def describe_attributes(
    labels: Mapping[str, str], measures: Measures | None, text: str, bands: Bands | None = None
) -> dict[str, str]:
    """Put labels and measures together: attributes by name, in the order of ``ATTRIBUTES``.

    A label wins over a measure of the same name (a corpus that says how loud it is knows better).
    """
    attributes, bands = {**labels, "text": text}, bands or Bands()
    if measures is not None:
        pitch = {"male": bands.man, "female": bands.woman}.get(labels.get("gender", ""))
        measured = {
            "pitch": band_word(measures.pitch, pitch or bands.anyone, ("low", "medium", "high")),
            "volume": band_word(measures.level, bands.volume, ("quiet", "normal", "loud")),
            "speed": band_word(measures.rate, bands.speed, ("slow", "normal", "fast")),
            "duration": f"{measures.duration:.1f} seconds",
        }
        attributes = {**measured, **{name: value for name, value in attributes.items() if value}}
    return {name: attributes[name] for name in ATTRIBUTES if attributes.get(name)}


def seed_transcript(attributes: Mapping[str, str], seconds: float) -> str:
    """Return the line that answers are written from, in the form of DIFFA's paper.

    ``[00:00 - 00:03]: "what is said" (Gender: female, Duration: 3s)``; the duration is rounded up
    to whole seconds.
    """
    stop = max(math.ceil(seconds), 1)
    span = f"[00:00 - {stop // 60:02d}:{stop % 60:02d}]"
    if attributes.get("text"):
        span = f'{span}: "{attributes["text"]}"'
    values = {**attributes, "duration": f"{stop}s"}
    facts = [
        f"{TITLES[name]}: {values[name]}"
        for name in ATTRIBUTES
        if name in TITLES and name in values
    ]
    return f"{span} ({', '.join(facts)})"
