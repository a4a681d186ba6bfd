"""Attack a server for a few seconds in each of several ways, and ask ordinary questions beside.

    python benchmarks/serve_hostile.py [--seconds 5]

Loopback only. The server is a process of its own, so its memory, threads and file descriptors are
its own, too. An ordinary question must be answered within twice its quiet time plus one second
while an attack lasts, and a minute later nothing of the attacks may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from reports import RESULTS, run_server, write_report
from serve_fuzz import CHAT, chat, clip, dumped, http, send, tiny_service

Address = tuple[str, int]
CLIENTS, DEATHS = 8, 50
DEADLY, DAMAGED = 13, 14  # values of max_tokens that the server of this benchmark acts on
POOLS = (
    "MainThread",
    "Thread",
    "worker",
    "sampler",
    "parsing",
    "decoding",
    "decoding long recordings",
    "downloads",
    "asyncio",
)
GOOD = clip()


# --- the server ---------------------------------------------------------------------------------


def serve(allowed_host: str) -> None:
    """Serve until standard input ends; every line of it is answered with what the threads are."""
    import torch

    from diffa.serving.batch import HeadCall, RequestBatch
    from diffa.serving.limits import Limits
    from diffa.serving.worker import Worker

    start, pause = Worker._start_batches, RequestBatch._pause

    def die(worker: Worker, new: Any) -> None:
        if any(handle.request.max_tokens == DEADLY for handle in new):
            raise SystemExit("a deadly request")
        start(worker, new)

    def damage(batch: RequestBatch, call: Any) -> Any:
        result = pause(batch, call)
        damaged = isinstance(call, HeadCall) and batch.handles[0].request.max_tokens == DAMAGED
        return torch.full_like(result, torch.nan) if damaged else result

    Worker._start_batches, RequestBatch._pause = die, damage  # type: ignore[method-assign]
    service = tiny_service(Limits(max_batch_size=8))
    service.allowed_hosts = (allowed_host,)
    with run_server(service) as address:
        print(json.dumps(address), flush=True)
        for _ in sys.stdin:
            names = (thread.name.partition("-")[0] for thread in threading.enumerate())
            print(json.dumps(Counter(name.partition("_")[0] for name in names)), flush=True)


class Server:
    """The server's process, and what it uses."""

    def __init__(self, allowed_host: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", allowed_host],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.address: Address = tuple(self._read())

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def usage(self) -> dict[str, Any]:
        """Return memory (MiB), file descriptors, and threads that belong to no pool."""
        assert self._process.stdin is not None
        self._process.stdin.write("threads\n")
        self._process.stdin.flush()
        others = {name: count for name, count in self._read().items() if name not in POOLS}
        folder = Path(f"/proc/{self._process.pid}")
        pages = int((folder / "statm").read_text().split()[1])
        return {
            "mib": pages * os.sysconf("SC_PAGE_SIZE") // 2**20,
            "descriptors": len(list((folder / "fd").iterdir())),
            "other_threads": others,
        }

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


# --- attacks: each is one connection or request ---------------------------------------------------


def flood(address: Address) -> None:
    """Send 300 MiB of headers, or as many as the server takes."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        for number in range(300):
            connection.sendall(b"x-%d: " % number + b"y" * 2**20 + b"\r\n")


def drip(address: Address) -> None:
    """Send a header a byte at a time."""
    with socket.create_connection(address, timeout=10) as connection:
        for letter in b"GET /v1/models HTTP/1.1\r\nHost: " + b"x" * 100:
            connection.sendall(bytes([letter]))
            time.sleep(0.05)


def upload(address: Address) -> None:
    """Send one large JSON body that holds no question."""
    send(address, http(CHAT, b"[" + b"1," * 400_000 + b"1]"))


def silence() -> bytes:
    """Return ten minutes of silence as FLAC, in a few kilobytes, whose header gives no length."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(48000 * 600, dtype="float32"), 48000, format="FLAC")
    data = bytearray(file.getvalue())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # STREAMINFO's 36 bits for the number of samples
    return bytes(data)


def attacks(slow_host: str) -> dict[str, Callable[[Address], Any]]:
    """Return all attacks by name."""
    bomb = http(CHAT, dumped(chat(silence())))
    deadly = http(CHAT, dumped(chat(GOOD, max_tokens=DEADLY)))
    damaged = http(CHAT, dumped(chat(GOOD, max_tokens=DAMAGED)))
    remote = chat()
    remote["messages"][0]["content"][0] = {
        "type": "audio_url", "audio_url": {"url": f"http://{slow_host}/a.wav"},
    }  # fmt: skip
    download = http(CHAT, dumped(remote))
    return {
        "flood": flood, "drip": drip, "upload": upload,
        "audio_bombs": lambda address: send(address, bomb),
        "slow_downloads": lambda address: send(address, download),
        "dying_workers": lambda address: send(address, deadly),
        "nan_logits": lambda address: send(address, damaged),
    }  # fmt: skip


@contextlib.contextmanager
def slow_host() -> Iterator[str]:
    """Yield ``host:port`` of a web server that sends a byte every half second."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip_body(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(120):
                connection.sendall(b"x")
                time.sleep(0.5)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=drip_body, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


# --- the measurement ------------------------------------------------------------------------------


def ask(address: Address) -> float:
    """Return the seconds that an ordinary question about a recording takes."""
    reply = send(address, http(CHAT, dumped(chat(GOOD, max_tokens=8))))
    if reply.status != 200:
        raise RuntimeError(f"an ordinary question gets status {reply.status}")
    return reply.seconds


def measure(attack: Callable[[Address], Any], address: Address, seconds: float) -> dict[str, Any]:
    """Return how an ordinary question fares during an attack by several clients."""
    until, count = time.monotonic() + seconds, itertools.count()

    def repeat() -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                attack(address)
            next(count)

    threads = [threading.Thread(target=repeat, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    times, failed = [], 0
    while time.monotonic() < until:
        try:
            times.append(ask(address))
        except (OSError, RuntimeError):
            failed += 1
    for thread in threads:
        thread.join(40)
    return {
        "attacks": next(count), "questions": len(times), "failed": failed,
        "worst_s": round(max(times, default=seconds), 3),
    }  # fmt: skip


def main() -> None:
    """Run the attacks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve-hostile.json")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    with slow_host() as host:
        server = Server(host)
        try:
            report = attack_all(server, attacks(host), args.seconds)
        finally:
            server.stop()
    write_report(report, args.out)
    print(json.dumps(report, indent=1))


def attack_all(
    server: Server, known: dict[str, Callable[[Address], Any]], seconds: float, rest: float = 60
) -> dict[str, Any]:
    """Return the report about all attacks on a server."""
    address = server.address
    for _ in range(20):
        ask(address)  # warm-up
    quiet = max(ask(address) for _ in range(20))
    report: dict[str, Any] = {
        "seconds": seconds, "clients": CLIENTS, "quiet_s": round(quiet, 3),
        "bound_s": round(2 * quiet + 1, 3), "before": server.usage(), "under": {},
    }  # fmt: skip
    for name, attack in known.items():
        report["under"][name] = one = measure(attack, address, seconds)
        one["held"] = one["worst_s"] <= report["bound_s"] and not one["failed"]
        one["mib"] = server.usage()["mib"]
        print(name, one, flush=True)
    for _ in range(DEATHS):
        known["dying_workers"](address)
    report["worst_after_deaths_s"] = round(max(ask(address) for _ in range(20)), 3)
    time.sleep(rest)
    report["rest_s"] = rest
    report["at_rest"] = server.usage()
    return report


if __name__ == "__main__":
    main()
