"""Cost of a second thread that has used PyTorch: answer times with and without one.

    python benchmarks/openmp.py

A thread that has run PyTorch operations on several cores keeps its own OpenMP threads. The same
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
from reports import write_report

import diffa
from diffa.nano.sources import Nano


def main() -> None:
    """Time both, print a line and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=30, help="Questions per round.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = diffa.build("nano")
    source = Nano(split="test", seed=1, count=args.count, samples_per_utterance=1)
    questions = [source[number] for number in range(args.count)]
    times_by_case: dict[str, list[float]] = {"one": [], "two": []}
    texts: dict[str, list[str]] = {}
    for _ in range(args.rounds + 1):
        for way, times in times_by_case.items():
            end = threading.Event()
            other = start_idle_thread(end) if way == "two" else None
            start = time.perf_counter()
            texts[way] = [model.answer(one.audio, one.question).text for one in questions]
            times.append((time.perf_counter() - start) / args.count)
            end.set()
            if other is not None:
                other.join()
    one, two = (statistics.median(times[1:]) for times in times_by_case.values())
    report = {
        "threads": torch.get_num_threads(), "rounds": args.rounds, "questions": args.count,
        "alone_s": one, "beside_s": two, "ratio": two / one, "equal": texts["one"] == texts["two"],
    }  # fmt: skip
    write_report(report, args.json)
    print(
        f"an answer takes {one:.4f} s, and {two:.4f} s ({two / one:.2f} times) once a second "
        "thread has computed anything"
    )


def start_idle_thread(end: threading.Event) -> threading.Thread:
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
