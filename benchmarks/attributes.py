"""Agreement of the measured attributes with the labels of the nano corpus.

`python benchmarks/attributes.py [--count 300] [--json FILE]`: the words for volume and speed
against the labels of composed utterances, pitch against synthetic voices of known pitch, and how
many seconds of audio are measured in a second on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from reports import write_report

from diffa.data.synthesis.attributes import band_word
from diffa.data.synthesis.measures import RATE, measure_speech
from diffa.nano.corpus.utterances import Utterances

VOLUME = (-33.0, -21.0)  # the bands of diffa data manifest
# nano names digits per second; syllables are 1.2 times as many
SPEED = (2.1, 2.8)
WORDS = {"loudness": ("quiet", "normal", "loud"), "speed": ("slow", "medium", "fast")}


def buzz(hertz: float, seconds: float, noise: float, draw: np.random.Generator) -> np.ndarray:
    """A voice-like sound of falling harmonics whose pitch wavers by 2 %, with noise."""
    time_ = np.arange(int(seconds * RATE)) / RATE
    phase = np.cumsum(hertz * (1 + 0.02 * np.sin(2 * np.pi * 5 * time_))) / RATE
    wave = sum(np.sin(2 * np.pi * k * phase) / k for k in range(1, int(4000 / hertz)))
    return (0.1 * wave + noise * draw.standard_normal(len(time_))).astype(np.float32)


def utterances(count: int, seed: int) -> dict[str, object]:
    """Agreement of words with labels over speech without other sounds."""
    speech, hits = Utterances("test", seed), dict.fromkeys(WORDS, 0)
    counts = dict.fromkeys(WORDS, 0)
    seconds, spent, index = 0.0, 0.0, -1
    while min(counts.values()) < count:
        index += 1
        wave, labels = speech[index]
        if not labels.digits or labels.sound:
            continue
        begin = time.perf_counter()
        measures = measure_speech(wave)
        spent += time.perf_counter() - begin
        seconds += measures.duration
        words = {"loudness": band_word(measures.level, VOLUME, WORDS["loudness"]),
                "speed": band_word(measures.rate, SPEED, WORDS["speed"])}  # fmt: skip
        for name in WORDS:
            right = getattr(labels, name)
            if right and counts[name] < count:
                counts[name] += 1
                hits[name] += words[name] == right
    shares = {name: round(hits[name] / counts[name], 3) for name in WORDS}
    return {
        "agreement": shares,
        "each": count,
        "audio_seconds_per_second": round(seconds / spent, 1),
    }


def pitches(count: int, seed: int) -> dict[str, float]:
    """Error over random pitches between 70 and 400 Hz, with noise 14 dB below."""
    draw = np.random.default_rng(seed)
    errors = []
    for _ in range(count):
        hertz = float(np.exp(draw.uniform(np.log(70), np.log(400))))
        pitch = measure_speech(buzz(hertz, 0.5, 0.02, draw)).pitch
        errors.append(abs(pitch / hertz - 1) if pitch else 1.0)
    return {"median_error": round(float(np.median(errors)), 5),
            "beyond_3_percent": round(float(np.mean(np.array(errors) > 0.03)), 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attributes.json"))
    args = parser.parse_args()
    report = utterances(args.count, args.seed) | {"pitch": pitches(args.count, args.seed)}
    report["seed"] = args.seed
    write_report(report, args.json)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
