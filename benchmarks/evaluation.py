"""Measure the runner on nano-suite: rows per second one at a time and in batches, in turn."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from reports import RESULTS, write_report

import diffa
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.runner import EvalConfig, evaluate
from diffa.evaluation.suites import load_suite
from diffa.nano.suite_files import write_suite


def main() -> None:
    """Ask the same rows one by one and in batches, round by round, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--sampler-preset", default="exact")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--rows", type=int, default=96, help="Rows per round; a run sorts them by length."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fsdd", default=None)
    parser.add_argument("--json", type=Path, default=RESULTS / "evaluation.json")
    args = parser.parse_args()
    model = diffa.build(args.spec)
    model = diffa.swap(model, sampler=model.spec.data["sampler_presets"][args.sampler_preset])
    with tempfile.TemporaryDirectory() as place:
        result = measure(model, Path(place), args)
    write_report(result, args.json)
    print(json.dumps(result, indent=1))


def measure(model: diffa.Model, place: Path, args: Any) -> dict[str, Any]:
    """Seconds of both by round. CPU seconds are what a busy machine does not change much."""
    per_task = -(-args.rounds * args.rows // 9)
    manifest = write_suite(place, fsdd=args.fsdd, per_task=per_task)
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = lines[0::per_task] + [x for n, x in enumerate(lines) if n % per_task]  # tasks mixed
    sizes = {"single": 1, "batched": args.batch}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sizes}
    same = 0
    for turn in range(-1, args.rounds):  # the first is a warm-up
        part = place / f"rows{turn}.jsonl"
        start = max(turn, 0) * args.rows
        part.write_text("".join(lines[start : start + args.rows]), encoding="utf-8")
        order = list(sizes) if turn % 2 else list(reversed(sizes))
        for name in order:
            spent = timed(model, part, place / f"{name}{turn}", sizes[name])
            if turn >= 0:
                seconds[name].append(spent)
        both = [(place / f"{name}{turn}" / "records.jsonl").read_bytes() for name in sizes]
        same += turn >= 0 and both[0] == both[1]
    rows = args.rounds * args.rows
    report: dict[str, Any] = {
        "spec": args.spec,
        "sampler_preset": args.sampler_preset,
        "digest": model.spec.digest(),
        "rows": rows,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
    }
    for column, unit in enumerate(("wall", "cpu")):
        rates = {name: rows / sum(s[column] for s in spent) for name, spent in seconds.items()}
        report[unit] = {name: round(rate, 3) for name, rate in rates.items()}
        report[unit]["speedup"] = round(rates["batched"] / rates["single"], 2)
    return {**report, "rounds_with_equal_records": same, "rounds": args.rounds}


def timed(model: diffa.Model, data: Path, out: Path, batch: int) -> tuple[float, float]:
    """Wall and CPU seconds of a run, scoring left out."""
    ends: list[tuple[float, float]] = []
    note = lambda progress: ends.append((time.perf_counter(), time.process_time()))  # noqa: E731
    begin = time.perf_counter(), time.process_time()
    evaluate(
        model,
        load_suite("nano-suite"),
        BenchmarkData(data),
        out,
        EvalConfig(batch_size=batch),
        on_progress=note,
    )
    return ends[-1][0] - begin[0], ends[-1][1] - begin[1]


if __name__ == "__main__":
    main()
