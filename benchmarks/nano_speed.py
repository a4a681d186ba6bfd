"""Real-time factor of nano's transcription under each setting: python benchmarks/nano_speed.py.

The settings take turns on the same utterances, one recording at a time, as one asks; the factor is
seconds of computing per second of audio, listening included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import diffa
from diffa.data.nano.utterances import Utterances
from diffa.data.nano.voices import WORDS
from diffa.evaluation.words import edits


def main() -> None:
    """Transcribe in turn, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    model = diffa.build(chosen.spec)
    settings = {
        name: diffa.swap(model, sampler=sampler)
        for name, sampler in model.spec.data["settings"].items()
    }
    speech = Utterances("test", 7)
    made = [u for u in (speech[i] for i in range(3 * chosen.count)) if u.labels.digits]
    made = made[: chosen.count]
    seconds = [len(u.wave) / 16_000 for u in made]
    factors: dict[str, list[float]] = {name: [] for name in settings}
    errors = dict.fromkeys(settings, 0)
    forwards = dict.fromkeys(settings, 0)
    words = 0
    for round_ in range(chosen.rounds):
        for utterance, length in zip(made, seconds, strict=True):
            target = [WORDS[d] for d in utterance.labels.digits]
            words += len(target) if round_ == 0 else 0
            for name, tried in settings.items():
                begin = time.perf_counter()
                answer = tried.answer(
                    torch.from_numpy(utterance.wave),
                    "Please transcribe the audio to text.",
                    max_tokens=chosen.tokens,
                )
                factors[name].append((time.perf_counter() - begin) / length)
                if round_ == 0:
                    errors[name] += edits(target, answer.text.split()).errors
                    forwards[name] += answer.forwards
    slow = statistics.median(factors["exact"])
    result = {
        "threads": torch.get_num_threads(),
        "utterances": len(made),
        "seconds of audio": round(sum(seconds), 1),
        "settings": {
            name: {
                "real-time factor": round(statistics.median(found), 4),
                "ratio": round(slow / statistics.median(found), 2),
                "forwards per answer": round(forwards[name] / len(made), 1),
                "word error": round(errors[name] / words, 4),
            }
            for name, found in factors.items()
        },
    }
    print(f"{'setting':10s} {'RTF':>8s} {'ratio':>6s} {'forwards':>9s} {'error':>6s}")
    for name, row in result["settings"].items():
        print(
            f"{name:10s} {row['real-time factor']:8.4f} {row['ratio']:6.2f}"
            f" {row['forwards per answer']:9.1f} {row['word error']:6.3f}"
        )
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
