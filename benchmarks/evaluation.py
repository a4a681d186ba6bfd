"""Measure the runner on nano-suite: rows per second one at a time and in batches, in turn."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from reports import write

import diffa
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.runner import EvalConfig, evaluate
from diffa.evaluation.suites import load_suite
from diffa.nano.suite_files import write_suite

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Ask the same rows one by one and in batches, round by round, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--setting", default="exact")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=96, help="of a round; runs sort them by length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fsdd", default=None)
    parser.add_argument("--json", type=Path, default=RESULTS / "evaluation.json")
    chosen = parser.parse_args()
    model = diffa.build(chosen.spec)
    model = diffa.swap(model, sampler=model.spec.data["settings"][chosen.setting])
    with tempfile.TemporaryDirectory() as place:
        result = measure(model, Path(place), chosen)
    write(result, chosen.json)
    print(json.dumps(result, indent=1))


def measure(model: diffa.Model, place: Path, chosen: Any) -> dict[str, Any]:
    """Seconds of both by round. CPU seconds are what a busy machine does not change much."""
    per_task = -(-chosen.rounds * chosen.rows // 9)
    manifest = write_suite(place, fsdd=chosen.fsdd, per_task=per_task)
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = lines[0::per_task] + [x for n, x in enumerate(lines) if n % per_task]  # tasks mixed
    sizes = {"single": 1, "batched": chosen.batch}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sizes}
    same = 0
    for turn in range(-1, chosen.rounds):  # the first is a rehearsal
        part = place / f"rows{turn}.jsonl"
        start = max(turn, 0) * chosen.rows
        part.write_text("".join(lines[start : start + chosen.rows]), encoding="utf-8")
        order = list(sizes) if turn % 2 else list(reversed(sizes))
        for name in order:
            spent = timed(model, part, place / f"{name}{turn}", sizes[name])
            if turn >= 0:
                seconds[name].append(spent)
        both = [(place / f"{name}{turn}" / "records.jsonl").read_bytes() for name in sizes]
        same += turn >= 0 and both[0] == both[1]
    rows = chosen.rounds * chosen.rows
    made: dict[str, Any] = {
        "spec": chosen.spec,
        "setting": chosen.setting,
        "digest": model.spec.digest(),
        "rows": rows,
        "batch": chosen.batch,
        "threads": torch.get_num_threads(),
    }
    for column, unit in enumerate(("wall", "cpu")):
        rates = {name: rows / sum(s[column] for s in spent) for name, spent in seconds.items()}
        made[unit] = {name: round(rate, 3) for name, rate in rates.items()}
        made[unit]["speedup"] = round(rates["batched"] / rates["single"], 2)
    return {**made, "rounds_with_equal_records": same, "rounds": chosen.rounds}


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
