"""Few rows times a large matrix on a CPU, torch.nn.Linear and diffa's Linear in turn.

    python benchmarks/cpu_linear.py

The two take turns on the same rows; the table gives medians of milliseconds and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from reports import write_report

from diffa.runtime.cpu_linear import Linear

SHAPES = ((1024, 1024), (1024, 3072), (3072, 1024), (1024, 126_464))


def main() -> None:
    """Time both, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = []
    with torch.inference_mode():
        for inner, outer in SHAPES:
            ours = Linear(inner, outer, bias=False)
            plain = torch.nn.Linear(inner, outer, bias=False)
            plain.weight = ours.weight
            for rows in (4, 8, 16, 32, 64, 128):
                seconds = race(plain, ours, torch.randn(1, rows, inner), args.rounds)
                table.append({"in": inner, "out": outer, "rows": rows, **seconds})
                print(
                    f"{inner:5d} -> {outer:6d} {rows:4d} rows: {seconds['torch']:8.2f} ms,"
                    f" ours {seconds['ours']:8.2f} ms, ratio {seconds['ratio']:.2f}"
                )
    result = {"threads": torch.get_num_threads(), "rounds": args.rounds, "rows": table}
    write_report(result, args.json)


def race(
    plain: torch.nn.Module, ours: torch.nn.Module, x: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds of both, a call of each in turn, and how much faster ours is."""
    times: dict[str, list[float]] = {"torch": [], "ours": []}
    for _ in range(rounds + 2):
        for name, part in (("torch", plain), ("ours", ours)):
            begin = time.perf_counter()
            part(x)
            times[name].append(1e3 * (time.perf_counter() - begin))
    middle = {name: statistics.median(values[2:]) for name, values in times.items()}
    ratio = middle["torch"] / middle["ours"]
    return {name: round(value, 3) for name, value in (*middle.items(), ("ratio", ratio))}


if __name__ == "__main__":
    main()
