"""Measure the real-time factor of nano's transcription under each sampler preset.

Run: python benchmarks/nano_speed.py. The sampler presets take turns on the same utterances, one
recording at a time. The factor is seconds of computing per second of audio, encoding included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from reports import write_report

import diffa
from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.evaluation.word_errors import count_edits
from diffa.nano.corpus.shaping import RATE
from diffa.nano.corpus.utterances import Utterances

QUESTION = "Please transcribe the audio to text."


def main() -> None:
    """Transcribe in turn, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    speech = Utterances("test", 7)
    utterances = [u for u in (speech[i] for i in range(3 * args.count)) if u.labels.digits]
    utterances = utterances[: args.count]
    result = {
        "threads": torch.get_num_threads(),
        "utterances": len(utterances),
        "seconds of audio": round(sum(len(u.audio) for u in utterances) / RATE, 1),
        "sampler_presets": measure(diffa.build(args.spec), utterances, args.rounds, args.tokens),
    }
    print(f"{'preset':10s} {'RTF':>8s} {'ratio':>6s} {'passes':>9s} {'error':>6s}")
    for name, row in result["sampler_presets"].items():
        print(
            f"{name:10s} {row['real-time factor']:8.4f} {row['ratio']:6.2f}"
            f" {row['forward passes per answer']:9.1f} {row['word error']:6.3f}"
        )
    write_report(result, args.json)


def measure(
    model: diffa.Model, utterances: list[Any], rounds: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Let every sampler preset transcribe every utterance in each round, in turn."""
    named = model.spec.data["sampler_presets"].items()
    models = {name: diffa.swap(model, sampler=sampler) for name, sampler in named}
    factors: dict[str, list[float]] = {name: [] for name in models}
    errors, num_forwards = dict.fromkeys(models, 0), dict.fromkeys(models, 0)
    for _ in range(rounds):
        for utterance in utterances:
            wave = torch.from_numpy(utterance.audio)
            target = [DIGIT_WORDS[digit] for digit in utterance.labels.digits]
            for name, candidate in models.items():
                begin = time.perf_counter()
                answer = candidate.answer(wave, QUESTION, max_tokens=tokens)
                factors[name].append((time.perf_counter() - begin) / (len(wave) / RATE))
                errors[name] += count_edits(target, answer.text.split()).errors
                num_forwards[name] += answer.num_forwards
    medians = {name: statistics.median(values) for name, values in factors.items()}
    words = rounds * sum(len(utterance.labels.digits) for utterance in utterances)
    return {
        name: {
            "real-time factor": round(median, 4),
            "ratio": round(medians["exact"] / median, 2),
            "forward passes per answer": round(num_forwards[name] / (rounds * len(utterances)), 1),
            "word error": round(errors[name] / words, 4),
        }
        for name, median in medians.items()
    }


if __name__ == "__main__":
    main()
