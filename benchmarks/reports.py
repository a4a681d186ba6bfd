"""Helpers that several benchmarks share: reports, memory, devices and a server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write_report(report: Mapping[str, Any], path: Path | None) -> None:
    """Write a report as JSON and create its folder; without a path nothing is written."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def process_memory(field: str = "VmRSS") -> int:
    """Return a field of this process's memory (VmRSS: now, VmHWM: peak), in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def synchronize(device: Any) -> None:
    """Wait until a GPU has finished its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def run_server(service: Any) -> Iterator[tuple[str, int]]:
    """Run a server in a thread of this process; yield its host and port."""
    from diffa.serving.run import create_server

    server = create_server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[:2]
    server.should_exit = True
    thread.join(30)
