"""What it costs to compute in a second thread: answers with and without one that has computed.

    python benchmarks/teams.py

A thread that has run PyTorch's operations on several cores keeps a team of OpenMP threads. The same
questions are answered in the main thread while there is none but its own, and while a second thread
lives that has computed once and does nothing more, in turn; seconds are medians.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

import torch
from reports import write

import diffa
from diffa.nano.sources import Nano


def main() -> None:
    """Race, print a line and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=30, help="Questions a round.")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    model = diffa.build("nano")
    source = Nano(split="test", seed=1, count=chosen.count, samples_per_utterance=1)
    asked = [source[number] for number in range(chosen.count)]
    taken: dict[str, list[float]] = {"one": [], "two": []}
    texts: dict[str, list[str]] = {}
    for _ in range(chosen.rounds + 1):
        for way, found in taken.items():
            end = threading.Event()
            other = second(end) if way == "two" else None
            begun = time.perf_counter()
            texts[way] = [model.answer(one.audio, one.question).text for one in asked]
            found.append((time.perf_counter() - begun) / chosen.count)
            end.set()
            if other is not None:
                other.join()
    one, two = (statistics.median(found[1:]) for found in taken.values())
    report = {
        "threads": torch.get_num_threads(), "rounds": chosen.rounds, "questions": chosen.count,
        "alone_s": one, "beside_s": two, "ratio": two / one, "equal": texts["one"] == texts["two"],
    }  # fmt: skip
    write(report, chosen.json)
    print(
        f"an answer takes {one:.4f} s, and {two:.4f} s ({two / one:.2f} times) once a second "
        "thread has computed anything"
    )


def second(end: threading.Event) -> threading.Thread:
    """A thread that has computed on all cores and lives until ``end``."""
    ready = threading.Event()

    def run() -> None:
        torch.ones(512, 512).mm(torch.ones(512, 512))
        ready.set()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    return thread


if __name__ == "__main__":
    main()
