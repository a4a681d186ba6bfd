"""Decoding on a GPU at LLaDA-8B's shape: python benchmarks/decode_gpu.py --json FILE.

Random weights in bfloat16, the prompt of 30 s of audio, 128 answer tokens in blocks of 32, 128
forward passes. The published loop and the dual cache take turns; a window step is compared with the
time that reading the weights once takes at the copy bandwidth measured in the same run; the dual
cache is run again at growing batches. ``--size small --device cpu`` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import decode
import published
import torch
from reports import synchronize, write_report

import diffa


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=decode.SIZES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--rounds", type=int, default=5, help="Rounds of a baseline step and a dual-cache run."
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--compile", action="store_true", help="Compile the window steps.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    decode.LENGTH = args.length
    spec = decode.spec(args.size)
    spec["backbone"]["compile"] = args.compile
    model = diffa.build(spec, device=args.device).eval()
    report = {
        "device": name(model.device),
        "size": args.size,
        "length": args.length,
        "compile": args.compile,
        **measure(model, args),
    }
    for key, value in report.items():
        print(key, value)
    write_report(report, args.json)


@torch.no_grad()
def measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a baseline step and of the dual cache's, weights' reading time, throughputs."""
    rate = bandwidth(model.device)
    size = sum(p.numel() * p.element_size() for p in model.backbone.parameters())
    run(model, 1)  # warm-up: kernels are selected, windows compiled
    plain, dual = list[float](), list[list[float]]()
    for _ in range(args.rounds):
        plain.append(plain_step(model))
        dual.append(run(model, 1))
    windows = [took for steps in dual for i, took in enumerate(steps) if i % decode.BLOCK]
    window, reading = statistics.median(windows), size / rate
    baseline = args.length * statistics.median(plain)
    seconds = statistics.median(map(sum, dual))
    batches = {rows: rows * args.length / sum(run(model, rows)) for rows in args.batches}
    return {
        "copy_bytes_per_second": round(rate),
        "weight_bytes": size,
        "reading_seconds": reading,
        "window_seconds": window,
        "window_over_reading": round(window / reading, 3),
        "baseline_seconds": baseline,
        "dual_seconds": seconds,
        "speedup": round(baseline / seconds, 2),
        "tokens_per_second_by_batch": {rows: round(rate, 2) for rows, rate in batches.items()},
        "peak_bytes": peak(model.device),
    }


def run(model: Any, rows: int) -> list[float]:
    """Seconds of every step of the dual cache on ``rows`` questions, one forward pass each."""
    options = {
        "name": "blockwise",
        "block_length": decode.BLOCK,
        "steps": decode.LENGTH,
        "stop_at_eos": False,
    }
    sampler = diffa.swap(model, sampler={**options, "cache": "dual"}).sampler
    canvas, denoise = decode.open_canvas(model, [question(model, row) for row in range(rows)])
    return list(timed(sampler(canvas, denoise), model.device))


def plain_step(model: Any) -> float:
    """Seconds of one step of the published loop on a canvas of masks."""
    answer = torch.full((1, decode.LENGTH), model.backbone.vocab.mask, device=model.device)
    steps = iter(lambda: published.step(model, question(model), answer, decode.BLOCK, 1), None)
    return next(timed(steps, model.device))


def question(model: Any, seed: int = 0) -> published.Question:
    """Return the random question of ``decode`` on the model's device and in its dtype."""
    question_ = decode.question(model, seed)
    parameter = next(model.backbone.parameters())
    return question_._replace(
        prompt=question_.prompt.to(parameter.device), audio=question_.audio.to(parameter)
    )


def timed(steps: Iterator[Any], device: torch.device) -> Iterator[float]:
    """Seconds that each step takes until the device has done it."""
    while True:
        synchronize(device)
        begin = time.perf_counter()
        if next(steps, None) is None:
            return
        synchronize(device)
        yield time.perf_counter() - begin


def bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second of a copy on the device, read and written ones counted; median of nine."""
    one, other = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    copies = iter(lambda: other.copy_(one).data_ptr(), None)
    times = timed(copies, device)
    return 2 * size / statistics.median(next(times) for _ in range(9))


def peak(device: torch.device) -> int | None:
    """Peak bytes allocated on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def name(device: torch.device) -> str:
    """Name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    main()
