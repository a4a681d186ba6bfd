"""Attack a server of this process for a few seconds each, and time an ordinary question beside.

    python benchmarks/serve_hostile.py [--seconds 5]

Loopback only. Prints one JSON object: seconds of an ordinary question while it is quiet and under
each attack (the worst of those asked), and memory, threads and file descriptors before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import threading
import time
import urllib.request
from collections.abc import Callable

from serve_fuzz import run_server, tiny_service

Address = tuple[str, int]
CLIENTS = 8


def ask(address: Address) -> float:
    """Return the seconds that an ordinary question takes."""
    body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 8}
    begin = time.monotonic()
    host, port = address
    url = f"http://{host}:{port}/v1/chat/completions"
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        response.read()
    return time.monotonic() - begin


def flood(connection: socket.socket) -> None:
    """Send 300 MiB of headers, or as many as the server takes."""
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    for number in range(300):
        connection.sendall(b"x-%d: " % number + b"y" * 2**20 + b"\r\n")


def drip(connection: socket.socket) -> None:
    """Send a header a byte at a time."""
    for letter in b"GET /v1/models HTTP/1.1\r\nHost: " + b"x" * 10**4:
        connection.sendall(bytes([letter]))
        time.sleep(0.05)


def upload(connection: socket.socket) -> None:
    """Send one large JSON body that holds no question."""
    body = b"[" + b"1," * 400_000 + b"1]"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % len(body) + body)
    connection.recv(4096)


def under(attack: Callable[[socket.socket], None], address: Address, seconds: float) -> float:
    """Return the longest of the ordinary questions that are asked during an attack."""
    until = time.monotonic() + seconds

    def repeat() -> None:
        while time.monotonic() < until:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(address, timeout=seconds) as connection,
            ):
                attack(connection)

    threads = [threading.Thread(target=repeat, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    worst = 0.0
    while time.monotonic() < until:
        worst = max(worst, ask(address))
    return worst


def usage() -> dict[str, int]:
    """Return this process's memory at its largest (MiB), threads and file descriptors."""
    return {
        "max_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def main() -> None:
    """Run the attacks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    with run_server(tiny_service()) as address:
        quiet = max(ask(address) for _ in range(10))
        report: dict[str, object] = {"before": usage(), "quiet": round(quiet, 3)}
        for attack in (flood, drip, upload):
            report[attack.__name__] = round(under(attack, address, seconds), 3)
        time.sleep(11)  # headers are given up after 10 s
        report["after"] = usage()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
