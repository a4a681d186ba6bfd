"""Every sampler, rule and cache on the package's recordings: python benchmarks/samplers.py.

Forward passes, tokens per forward pass, seconds, and how many answers equal those of one token per
forward pass. The configurations take turns on every question, so that a busy machine slows them all
alike. Writes benchmarks/results/samplers.json, from which docs/samplers.md is built.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from nano_decode import SAMPLERS
from reports import RESULTS, write_report

import diffa
from diffa.nano.demo import recordings

QUESTIONS = (
    "Please transcribe the audio to text.",
    "What can you hear from the audio?",
    "How many digits are spoken?",
)
EXACT = "one per step"


def main() -> None:
    """Run every configuration, compare the answers and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--json", type=Path, default=RESULTS / "samplers.json")
    args = parser.parse_args()
    model = diffa.build(args.spec)
    models = {name: diffa.swap(model, sampler=sampler) for name, sampler in SAMPLERS.items()}
    results: dict[str, list[tuple[list[int], int, int, float]]] = {name: [] for name in models}
    for recording in sorted(recordings().glob("*.flac")):
        for question in QUESTIONS:
            for name, one in models.items():
                results[name].append(measured(one, recording, question, args.max_tokens))
    rows = [row(name, results[name], results[EXACT]) for name in models]
    report = {"spec": args.spec, "threads": torch.get_num_threads(), "rows": rows}
    write_report(report, args.json)
    for line in rows:
        print("  ".join(str(value) for value in line.values()))


def measured(
    model: Any, recording: Path, question: str, tokens: int
) -> tuple[list[int], int, int, float]:
    """An answer's tokens, how many there are up to the end, forward passes, seconds."""
    begin = time.perf_counter()
    answer = model.answer(recording, question, max_tokens=tokens)
    seconds = time.perf_counter() - begin
    ids = answer.tokens.tolist()
    ends = [place for place, token in enumerate(ids) if token == model.backbone.vocab.eos]
    return ids, (ends[0] + 1 if ends else len(ids)), answer.num_forwards, seconds


def row(name: str, results: list[Any], exact: list[Any]) -> dict[str, Any]:
    """One line of the table."""
    num_forwards = sum(one[2] for one in results)
    same = sum(one[0] == other[0] for one, other in zip(results, exact, strict=True))
    return {
        "configuration": name,
        "options": ", ".join(f"{k}: {v}" for k, v in SAMPLERS[name].items() if k != "name"),
        "sampler": SAMPLERS[name]["name"],
        "forward passes per answer": round(num_forwards / len(results), 1),
        "tokens per forward": round(sum(one[1] for one in results) / num_forwards, 2),
        "seconds per answer": round(sum(one[3] for one in results) / len(results), 2),
        "same": f"{same} of {len(results)}",
    }


if __name__ == "__main__":
    main()
