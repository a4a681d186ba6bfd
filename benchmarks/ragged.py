"""Questions about recordings of different lengths, padded and laid end to end.

    python benchmarks/ragged.py

A batch is answered by nano one token per forward, with the rows padded to the longest and with
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
from reports import write

import diffa
from diffa.backbones import transformer
from diffa.nano.sources import Nano


def main() -> None:
    """Race, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    model = diffa.build("nano")
    model = diffa.swap(model, sampler=model.spec.data["sampler_presets"]["exact"])
    source = Nano(split="test", seed=1, count=max(chosen.batches), samples_per_utterance=1)
    asked = [source[i] for i in range(max(chosen.batches))]
    table = []
    for rows in chosen.batches:
        table.append({"rows": rows, **race(model, asked[:rows], chosen.rounds)})
        print(
            "{rows:3d} rows: padded {padded:.3f} s, end to end {packed:.3f} s, "
            "ratio {ratio:.2f}, {equal} answers equal".format(**table[-1])
        )
    write({"threads": torch.get_num_threads(), "rounds": chosen.rounds, "rows": table}, chosen.json)


def race(model: Any, asked: list[Any], rounds: int) -> dict[str, float]:
    """Median seconds of both, an answer of each in turn."""
    ways = {"padded": lambda context, embeds: None, "packed": transformer.ragged}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            transformer.ragged = way
            begin = time.perf_counter()
            made = model.answer([one.audio for one in asked], [one.question for one in asked])
            taken[name].append(time.perf_counter() - begin)
            texts[name] = made.text
    middle = {name: statistics.median(found[1:]) for name, found in taken.items()}
    equal = sum(a == b for a, b in zip(*texts.values(), strict=True))
    return {**middle, "ratio": middle["padded"] / middle["packed"], "equal": equal}


if __name__ == "__main__":
    main()
