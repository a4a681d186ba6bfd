"""Rows of different lengths, padded or packed end to end.

    python benchmarks/ragged.py

A batch is answered by nano one token per forward pass, with the rows padded to the longest and with
nothing computed for padding, in turn; the table gives medians of seconds and their ratio, and how
many answers are the same.
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
from diffa.backbones import transformer
from diffa.nano.sources import Nano


def main() -> None:
    """Time both, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = diffa.build("nano")
    model = diffa.swap(model, sampler=model.spec.data["sampler_presets"]["exact"])
    source = Nano(split="test", seed=1, count=max(args.batches), samples_per_utterance=1)
    questions = [source[i] for i in range(max(args.batches))]
    table = []
    for rows in args.batches:
        table.append({"rows": rows, **race(model, questions[:rows], args.rounds)})
        print(
            "{rows:3d} rows: padded {padded:.3f} s, end to end {packed:.3f} s, "
            "ratio {ratio:.2f}, {equal} answers equal".format(**table[-1])
        )
    write_report(
        {"threads": torch.get_num_threads(), "rounds": args.rounds, "rows": table}, args.json
    )


def race(model: Any, questions: list[Any], rounds: int) -> dict[str, float]:
    """Median seconds of both, an answer of each in turn."""
    ways = {"padded": lambda context, embeds: None, "packed": transformer.pack_rows}
    times: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            transformer.pack_rows = way
            begin = time.perf_counter()
            answer = model.answer(
                [one.audio for one in questions], [one.question for one in questions]
            )
            times[name].append(time.perf_counter() - begin)
            texts[name] = answer.text
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    equal = sum(a == b for a, b in zip(*texts.values(), strict=True))
    return {**middle, "ratio": middle["padded"] / middle["packed"], "equal": equal}


if __name__ == "__main__":
    main()
