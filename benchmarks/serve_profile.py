"""Where a server's time goes: CPU milliseconds of an answer by stage, one client and many.

    python benchmarks/serve_profile.py --requests 200 --clients 1,16

The requests are those of ``serve.py`` without the cancelled ones. Stages of the model are timed in
the thread that runs them; all other threads by what the system says that they computed. CPU time
is counted, not seconds by the clock, so other programs disturb it little.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from reports import RESULTS, run_server, write_report
from serve import crowd, mix

import diffa
from diffa.runtime.threads import single_core
from diffa.serving.limits import Limits
from diffa.serving.service import Service

TICKS = os.sysconf("SC_CLK_TCK")
SECONDS: Counter[str] = Counter()  # of CPU, by stage of the model
_LOCK = threading.Lock()


def timed(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``work``, which adds its CPU seconds in the calling thread to a stage."""

    @functools.wraps(work)
    def run(*args: Any, **options: Any) -> Any:
        begin = time.thread_time()
        try:
            return work(*args, **options)
        finally:
            with _LOCK:
                SECONDS[stage] += time.thread_time() - begin

    return run


def time_stages(model: Any) -> None:
    """Time the stages of a model."""
    model.encoder.forward = timed("encoder", model.encoder.forward)
    for adapter in model.adapters.values():
        adapter.forward = timed("adapters", adapter.forward)
    model.backbone.forward = timed("backbone", model.backbone.forward)
    model.backbone.head.forward = timed("head", model.backbone.head.forward)


def thread_seconds() -> dict[str, tuple[str, float]]:
    """Return the name and the CPU seconds of every thread of this process; Linux only."""
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    seconds = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        name = names.get(task.name, "OpenMP")
        name = "event loop" if name.startswith("Thread-") else name.partition("_")[0]
        seconds[task.name] = name, (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


def profile(service: Service, port: int, requests: list[Any], clients: int, outside: Any) -> Any:
    """Return the CPU milliseconds of an answer by stage, and how the requests were batched."""
    SECONDS.clear()
    before, load = thread_seconds(), service.engine.load()
    _, seconds = outside.submit(crowd, port, requests, clients).result()
    threads: Counter[str] = Counter()
    for task, (name, spent) in thread_seconds().items():
        threads[name] += spent - before.get(task, (name, 0.0))[1]
    stages = dict(SECONDS)
    stages["worker, besides the model"] = threads.pop("worker") - sum(stages.values())
    stages |= {name: spent for name, spent in threads.items() if spent > 0}
    model = sum(stages[name] for name in ("encoder", "adapters", "backbone", "head"))
    after = service.engine.load()
    return {
        "clients": clients,
        "answers_per_s": round(len(requests) / seconds, 2),
        "rows_per_forward": round(
            (after.num_rows - load.num_rows) / (after.num_forwards - load.num_forwards), 2
        ),
        "cpu_ms": {
            name: round(1000 * spent / len(requests), 2)
            for name, spent in sorted(stages.items(), key=lambda pair: -pair[1])
        },
        "share_of_the_model": round(model / sum(stages.values()), 3),
    }


def main() -> None:
    """Profile the server with each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", default="1,16")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve-profile.json")
    args = parser.parse_args()
    with single_core():
        model = diffa.build("nano")
    time_stages(model)
    limits = Limits(max_batch_size=64, max_waiting=128, deadline=600, cached_embeddings=0)
    service = Service(model, "nano", limits=limits)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as outside,
        run_server(service) as (_, port),
    ):
        with single_core():
            presets = ["exact", "balanced", "fast"]
            requests = mix(args.requests, Path(folder), presets, 0, 1)
        requests = [one for one in requests if one.how != "cancel"]
        outside.submit(crowd, port, requests[:24], 8).result()  # warm-up
        runs = [
            profile(service, port, requests, int(count), outside)
            for count in args.clients.split(",")
        ]
    report = {"requests": len(requests), "threads": torch.get_num_threads(), "runs": runs}
    write_report(report, args.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
