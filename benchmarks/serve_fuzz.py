"""Malformed requests against a server: only 4xx answers, nothing hangs, memory stays flat.

    python benchmarks/serve_fuzz.py --requests 10000

Bodies are broken in ways that clients and attackers break them; what is still a proper request by
chance may be answered with 200, and is counted. Every so often a proper request must succeed.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import random
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from reports import RESULTS, process_memory, run_server, write_report

import diffa
from diffa.serving.limits import Limits
from diffa.serving.service import Service

CHAT, HEAR = "/v1/chat/completions", "/v1/audio/transcriptions"
LIMITS = Limits(
    max_batch_size=8,
    max_waiting=64,
    max_body_bytes=2**20,
    max_audio_seconds=10.0,
    max_tokens=32,
    max_text_chars=4000,
    body_timeout=2.0,
)
NASTY: list[Any] = [
    None, True, False, 0, -1, 10**30, 1e308, -0.5, "", "x", "\x00", "\ud800", "a" * 5000, [], {},
    [[]], {"a": 1}, [None], "<audio>", "{question}", "data:", "data:audio/wav;base64,", 2**63,
    "http://localhost:1/x", "file:///etc/passwd", "gopher://localhost", {"url": "x"}, "1e9",
]  # fmt: skip


class Reply:
    """Status of an answer, 0 where the connection was closed without one."""

    def __init__(self, status: int, seconds: float) -> None:
        self.status, self.seconds = status, seconds


def send(place: tuple[str, int], data: bytes, *, slowly: bool = False) -> Reply:
    """Send raw bytes and read the status of the answer."""
    start, received = time.perf_counter(), b""
    with socket.create_connection(place, timeout=60) as connection:
        try:
            if slowly:
                half = data.index(b"\r\n\r\n") + 6
                connection.sendall(data[:half])
            else:
                connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may answer before it has read everything
        try:
            while b"\r\n" not in received and (more := connection.recv(65536)):
                received += more
        except ConnectionResetError:
            pass
    status = re.match(rb"HTTP/1\.1 (\d{3})", received)
    return Reply(int(status[1]) if status else 0, time.perf_counter() - start)


def http(
    path: str, body: bytes, kind: str = "application/json", method: str = "POST", more: str = ""
) -> bytes:
    """A request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return (
        head + f"Content-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    ).encode() + body


def clip(form: str = "WAV", seconds: float = 0.2, **options: Any) -> bytes:
    """Bytes of a noise."""
    noise = np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)).astype("float32")
    file = io.BytesIO()
    soundfile.write(file, noise, 16000, format=form, **options)
    return file.getvalue()


def chat(data: object = None, **more: Any) -> dict[str, Any]:
    """Return a valid body, or one with other data in its audio part."""
    if isinstance(data, bytes):
        data = base64.b64encode(data).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    parts = [audio, {"type": "text", "text": "What is heard?"}]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 4,
        **more,
    }


def dumped(value: Any) -> bytes:
    """JSON, lone surrogates and NaN included."""
    return json.dumps(value).encode()


class Faults:
    """Makes malformed requests; every method takes a random generator and returns raw bytes."""

    def __init__(self) -> None:
        self.good = {form: clip(form) for form in ("WAV", "FLAC", "OGG", "MP3")}
        silence = np.zeros(48000 * 600, dtype="float32")
        file = io.BytesIO()
        soundfile.write(file, silence, 48000, format="FLAC")
        self.bomb = file.getvalue()  # ten minutes in a few kilobytes
        loud = np.full(3200, np.nan, dtype="float32")
        file = io.BytesIO()
        soundfile.write(file, loud, 16000, format="WAV", subtype="FLOAT")
        self.nan = file.getvalue()
        self.zip = zlib.compress(b"\0" * 10**6)
        self.gzip = gzip.compress(dumped(chat(self.good["WAV"])))

    def wrong_value(self, rng: random.Random) -> bytes:
        """One value somewhere in the body is replaced."""
        body = chat(self.good["WAV"], stream=False, temperature=0.5, seed=1, diffa={"sampler": {}})
        places: list[tuple[Any, Any]] = []

        def walk(value: Any) -> None:
            keys = value if isinstance(value, dict) else range(len(value))
            for key in list(keys):
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    walk(value[key])

        walk(body)
        holder, key = rng.choice(places)
        holder[key] = rng.choice(NASTY)
        return http(CHAT, dumped(body))

    def wrong_option(self, rng: random.Random) -> bytes:
        """Sampler options that are unknown, out of range or do not combine."""
        names = [
            "block_length",
            "steps",
            "threshold",
            "factor",
            "entropy_bound",
            "cfg_scale",
            "cache",
            "ranking",
        ]
        options = {rng.choice([*names, "x", "vocab", "name"]): rng.choice([*NASTY, -5, 10**9])}
        options["block_length"] = rng.choice([0, -1, 10**9, "8", None, 1.5, [1]])
        return http(CHAT, dumped(chat(self.good["WAV"], diffa={"sampler": options})))

    def cut_base64(self, rng: random.Random) -> bytes:
        """Base64 that stops early, or holds other characters."""
        text = base64.b64encode(self.good["WAV"]).decode()
        text = text[: rng.randrange(len(text))] + rng.choice(["", "!", "\n\n", "é", "=", "A"])
        return http(CHAT, dumped(chat(text)))

    def broken_audio(self, rng: random.Random) -> bytes:
        """Bytes of a recording flipped, cut, or repeated."""
        data = bytearray(self.good[rng.choice(list(self.good))])
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(min(len(data), rng.choice([44, 10**9])))] = rng.randrange(256)
        return http(
            CHAT, dumped(chat(bytes(data[: rng.choice([10**9, rng.randrange(len(data))])])))
        )

    def lying_header(self, rng: random.Random) -> bytes:
        """A WAV header with impossible rates, channels or lengths."""
        data = bytearray(self.good["WAV"])
        for at, size in rng.sample(
            [(4, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (40, 4)], 2
        ):
            data[at : at + size] = rng.choice([0, 1, 2 ** (8 * size) - 1, 44099]).to_bytes(
                4, "little"
            )[:size]
        return http(CHAT, dumped(chat(bytes(data))))

    def bombs(self, rng: random.Random) -> bytes:
        """Compressed silence, zipped zeros, NaN, and compressed bodies."""
        kind = rng.randrange(5)
        if kind == 4:
            return http(CHAT, self.gzip, more="Content-Encoding: gzip\r\n")
        return http(
            CHAT, dumped(chat([self.bomb, self.nan, self.zip, b"PK\x03\x04" + self.zip][kind]))
        )

    def not_json(self, rng: random.Random) -> bytes:
        """Deep, cut, binary, or too large for a number."""
        deep = rng.choice([500, 10**4, 4 * 10**5])
        bodies = [
            b"[" * deep, b'{"a":' * deep, b"", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", b"{",
            b'{"max_tokens": NaN}', b'{"max_tokens": ' + b"9" * 10**5 + b"}", rng.randbytes(200),
            dumped(chat(self.good["WAV"]))[: rng.randrange(500)], b"{'a': 1}",
            b'{"messages": ' + b"[" * deep + b"]" * deep + b"}",
        ]  # fmt: skip
        return http(CHAT, rng.choice(bodies))

    def framing(self, rng: random.Random) -> bytes:
        """HTTP itself: lengths, methods, paths, chunks."""
        body = dumped(chat(self.good["WAV"]))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"
        return rng.choice(
            [
                http(CHAT, body, method="PUT"),
                http("/v1/" + "x" * rng.randrange(1, 3000), body),
                http("/v1/models/other", b"", method="GET"),
                http("/v1/chat/completions/../../x", body),
                (head + f"Content-Length: {10**12}\r\n\r\n").encode() + body,
                (head + "Content-Length: -5\r\n\r\n").encode() + body,
                (head + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n").encode() + body,
                (head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n").encode() + body,
                (head + "Transfer-Encoding: chunked\r\n\r\n").encode()
                + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 20 + b"0\r\n\r\n",
                http(CHAT, b" " * (2**20 + 1)),
                rng.randbytes(300) + b"\r\n\r\n",
                b"GET / HTTP/9.9\r\n\r\n",
            ]
        )  # fmt: skip

    def forms(self, rng: random.Random) -> bytes:
        """Multipart bodies without a boundary, a file, an end, or with too many parts."""
        part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%s\r\n'
        good, end = file % self.good["WAV"], b"--b--\r\n"
        body, kind = rng.choice(
            [
                (good + end, "multipart/form-data"),
                (good + end, "multipart/form-data; boundary=other"),
                (good + end, "application/json"),
                (part % (b"file", b"x") + end, "multipart/form-data; boundary=b"),
                (part % (b"temperature", b"hot") + good + end, "multipart/form-data; boundary=b"),
                (
                    part % (b"response_format", b"srt") + good + end,
                    "multipart/form-data; boundary=b",
                ),
                (part % (b"model", b"other") + good + end, "multipart/form-data; boundary=b"),
                (part % (b"prompt", b"x" * 9000) + good + end, "multipart/form-data; boundary=b"),
                ((part % (b"x", b"y")) * 200 + end, "multipart/form-data; boundary=b"),
                (good * 5 + end, "multipart/form-data; boundary=b"),
                (file % self.bomb + end, "multipart/form-data; boundary=b"),
                (file % rng.randbytes(500) + end, "multipart/form-data; boundary=b"),
                (good[: rng.randrange(len(good))], "multipart/form-data; boundary=b"),
                (b"", "multipart/form-data; boundary=b"),
            ]
        )
        return http(HEAR, body, kind)


def kinds(faults: Faults) -> dict[str, Callable[[random.Random], bytes]]:
    """Every way to break a request, by name."""
    names = [
        "wrong_value", "wrong_option", "cut_base64", "broken_audio", "lying_header", "bombs",
        "not_json", "framing", "forms",
    ]  # fmt: skip
    return {name: getattr(faults, name) for name in names}


def tiny_service(limits: Limits = LIMITS) -> Service:
    """Return a service of the tiny model."""
    torch.set_num_threads(1)
    return Service(diffa.build("tiny"), "tiny", limits=limits)


def fuzz(place: tuple[str, int], count: int, *, clients: int = 8, seed: int = 0) -> dict[str, Any]:
    """Send malformed requests and count the answers by kind."""
    faults = Faults()
    makers, names = kinds(faults), list(kinds(faults))
    proper = http(CHAT, dumped(chat(faults.good["WAV"])))
    answers: dict[str, Counter[int]] = {name: Counter() for name in [*names, "slow", "proper"]}
    slowest = [0.0]
    lock = threading.Lock()

    def one(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        name = names[number % len(names)]
        data, slowly = makers[name](rng), False
        if number % 500 == 250:
            name, data, slowly = "slow", proper, True
        elif number % 100 == 0:
            name, data = "proper", proper
        reply = send(place, data, slowly=slowly)
        with lock:
            answers[name][reply.status] += 1
            slowest[0] = max(slowest[0], reply.seconds)

    memory = []
    with ThreadPoolExecutor(clients) as pool:
        tenth = max(1, count // 10)
        for start in range(0, count, tenth):
            list(pool.map(one, range(start, min(count, start + tenth))))
            memory.append(round(process_memory() / 2**20, 1))
    return {
        "requests": count,
        "answers": {name: dict(sorted(counts.items())) for name, counts in answers.items()},
        "server_errors": sum(n for c in answers.values() for s, n in c.items() if s >= 500),
        "unanswered": sum(counts[0] for counts in answers.values()),
        "slowest_s": round(slowest[0], 2),
        "memory_mib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve-fuzz.json")
    args = parser.parse_args()
    with run_server(tiny_service()) as place:
        fuzz(place, 300, seed=1)  # warm-up: one-time allocations
        start = time.perf_counter()
        report = fuzz(place, args.requests)
        report["seconds"] = round(time.perf_counter() - start, 1)
    write_report(report, args.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
