"""Many clients at once against one at a time: equal answers, throughput, waiting times.

    python benchmarks/serve.py --requests 2000 --clients 64

Short, long, streamed and cancelled requests about recordings of the nano corpus go from a process
of clients to a server in this one; every answer is compared with what the library gives for that
request alone, in a process where nothing else has computed. The library, the server with one client
and the server with all of them take turns, a portion of the requests at a time. Where texts differ,
the request is decoded again in float64: it counts as undecided when some choice on the way was
closer than 1e-5.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.client
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import torch
from reports import write

import diffa
from diffa.nano.sources import Nano
from diffa.runtime.threads import single_core
from diffa.serving.limits import Limits
from diffa.serving.run import configured
from diffa.serving.service import Service

RESULTS = Path(__file__).parent / "results"
CLOSE = 1e-5
_MODELS: dict[str, Any] = {}  # of the library's process


class Asked(NamedTuple):
    """One request of the mix; ``how`` is whole, stream or cancel."""

    number: int
    clip: Path
    question: str
    tokens: int
    sampler_preset: str
    how: str


class Got(NamedTuple):
    """What came of it: text (None: cancelled or lost), seconds, and those to the first text."""

    text: str | None
    seconds: float
    first: float | None


class Times(NamedTuple):
    """Seconds of a portion by the clock; ``single`` is the server with one client, who cancels
    nothing. What the server ran for all clients: ``forwards``, and ``rows`` in them."""

    alone: float
    single: float
    together: float
    num_forwards: int
    rows: int


def ratio(one: list[float], many: list[float]) -> float:
    """How many times faster."""
    return round(sum(one) / sum(many), 3)


def mix(count: int, folder: Path, sampler_presets: list[str], seed: int, per: int) -> list[Asked]:
    """Requests: two thirds short, one third long; a third streamed, a tenth cancelled. ``per``
    questions are about the same recording."""
    source, rng = Nano(split="test", seed=seed, count=count, samples_per_utterance=per), random.Random(seed)
    made = []
    for number in range(count):
        sample = source[number]
        clip = folder / f"{number}.wav"
        audio: Any = sample.audio
        soundfile.write(clip, audio.numpy(), sample.rate or 16000, subtype="FLOAT")
        how = rng.choices(["whole", "stream", "cancel"], [57, 33, 10])[0]
        tokens = rng.choice([8, 16, 48])
        made.append(Asked(number, clip, sample.question, tokens, rng.choice(sampler_presets), how))
    return made


@contextlib.contextmanager
def served(model: Any, limits: Limits) -> Iterator[tuple[Service, int]]:
    """A server in this process; yields it and its port."""
    service = Service(model, "nano", limits=limits)
    server = configured(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield service, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(30)


def body_of(asked: Asked) -> str:
    """What is sent."""
    audio = {"data": base64.b64encode(asked.clip.read_bytes()).decode(), "format": "wav"}
    parts = [
        {"type": "input_audio", "input_audio": audio},
        {"type": "text", "text": asked.question},
    ]
    body = {
        "model": f"nano:{asked.sampler_preset}",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": asked.tokens,
        "stream": asked.how != "whole",
    }
    return json.dumps(body)


def ask(port: int, asked: Asked, body: str) -> Got:
    """Send one request, and read its answer as its kind is read."""
    begun = time.perf_counter()
    made = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        made.request("POST", "/v1/chat/completions", body)
        if asked.how == "cancel":
            time.sleep(random.Random(asked.number).uniform(0, 2))
            return Got(None, time.perf_counter() - begun, None)
        reply = made.getresponse()
        if reply.status != 200:
            return Got(None, time.perf_counter() - begun, None)
        if asked.how == "whole":
            text = json.loads(reply.read())["choices"][0]["message"]["content"]
            return Got(text, time.perf_counter() - begun, None)
        return streamed(reply, begun)
    finally:
        made.close()


def streamed(reply: http.client.HTTPResponse, begun: float) -> Got:
    """Put the pieces of a stream together."""
    text, first, ended = "", None, False
    for line in reply:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            ended = True
            break
        event = json.loads(line[6:])
        piece = event["choices"][0]["delta"].get("content") if event.get("choices") else None
        if piece:
            first = first or time.perf_counter() - begun
            text += piece
    return Got(text if ended else None, time.perf_counter() - begun, first)


def alone(part: list[Asked]) -> tuple[dict[int, str], float]:
    """The library's answers to requests by themselves, and the seconds; runs in the library's own
    process."""
    if not _MODELS:
        model = diffa.build("nano")
        known = model.spec.data["sampler_presets"]
        _MODELS.update({name: diffa.swap(model, sampler=known[name]) for name in known})
        answer(part[0])
    begun = time.perf_counter()
    found = {asked.number: answer(asked) for asked in part}
    return found, time.perf_counter() - begun


def answer(asked: Asked) -> str:
    """The library's answer to one request."""
    model = _MODELS[asked.sampler_preset]
    found: str = model.answer(asked.clip, asked.question, max_tokens=asked.tokens).text
    return found


def margin(spec: Any, asked: Asked) -> float:
    """The closest choice while the request is decoded in float64: between two tokens of a slot,
    or between accepting a slot and not."""
    model = diffa.build(spec, dtype="float64")
    model = diffa.swap(model, sampler=model.spec.data["sampler_presets"][asked.sampler_preset])
    head, closest = model.backbone.head, [float("inf")]
    rule = model.sampler.rule

    def watched(hidden: Any) -> Any:
        logits = head(hidden)
        seen = logits.clone().flatten(0, -2)
        seen[:, model.backbone.vocab.mask] = -torch.inf
        top = torch.softmax(seen, dim=-1).topk(2, dim=-1).values
        closest[0] = min(closest[0], float((top[:, 0] - top[:, 1]).min()))
        sure = top[:, 0].sort(descending=True).values
        if rule.threshold is not None:
            closest[0] = min(closest[0], float((sure - rule.threshold).abs().min()))
        if rule.factor is not None:
            count = torch.arange(2, len(sure) + 2)
            closest[0] = min(closest[0], float((count * (1 - sure) - rule.factor).abs().min()))
        if len(sure) > 1 and (rule.threshold is None or sure[0] < rule.threshold):
            closest[0] = min(closest[0], float(sure[0] - sure[1]))
        return logits

    model.backbone.head = watched
    model.answer(asked.clip, asked.question, max_tokens=asked.tokens)
    return closest[0]


def crowd(port: int, part: list[Asked], clients: int) -> tuple[list[Got], float]:
    """Send requests, so many at a time, and count the seconds from the first to the last; runs in
    the clients' own process. What is sent is written before."""
    bodies = [body_of(asked) for asked in part]
    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        got = list(pool.map(functools.partial(ask, port), part, bodies))
    return got, time.perf_counter() - begun


def portion(
    service: Service,
    port: int,
    part: list[Asked],
    clients: int,
    library: Executor,
    outside: Executor,
) -> tuple[list[str | None], list[Got], list[Got], Times]:
    """Texts of a portion alone, what one client got, what all of them got, and the times; the
    first two leave out what will be cancelled."""
    kept = [asked for asked in part if asked.how != "cancel"]
    texts, by_itself = library.submit(alone, kept).result()
    single, one_by_one = outside.submit(crowd, port, kept, 1).result()
    before = service.engine.load()
    got, all_at_once = outside.submit(crowd, port, part, clients).result()
    load = service.engine.load()
    ran = load.num_forwards - before.num_forwards, load.rows - before.rows
    took = Times(by_itself, one_by_one, all_at_once, *ran)
    return [texts.get(asked.number) for asked in part], single, got, took


def summary(got: list[Got]) -> dict[str, float]:
    """Median and 95th percentile of seconds."""
    waits = sorted(one.seconds for one in got if one.text is not None)
    firsts = sorted(one.first for one in got if one.first is not None)

    def at(values: list[float], share: float) -> float:
        return round(values[min(len(values) - 1, int(share * len(values)))], 3) if values else 0.0

    return {
        "p50_s": at(waits, 0.5), "p95_s": at(waits, 0.95),
        "first_text_p50_s": at(firsts, 0.5), "first_text_p95_s": at(firsts, 0.95),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--per", type=int, default=1, help="Questions about the same recording.")
    parser.add_argument("--remember", type=int, default=0, help="Audio embeddings to keep.")
    parser.add_argument("--portion", type=int, default=1000)
    parser.add_argument("--sampler-presets", default="exact,balanced,fast")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    chosen = parser.parse_args()
    with single_core():
        model = diffa.build("nano")
    sampler_presets = chosen.sampler_presets.split(",")
    limits = Limits(
        rows=chosen.rows,
        waiting=max(64, 2 * chosen.clients),
        deadline=600,
        remember=chosen.remember,
    )
    expected: list[str | None] = []
    single: list[Got] = []
    got: list[Got] = []
    times: list[Times] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as library,
        ProcessPoolExecutor(1, get_context("spawn")) as outside,
        served(model, limits) as (service, port),
    ):
        with single_core():
            asked = mix(chosen.requests, Path(folder), sampler_presets, 0, chosen.per)
        portion(service, port, asked[: chosen.rows], chosen.clients, library, outside)  # warm
        for start in range(0, len(asked), chosen.portion):
            part = asked[start : start + chosen.portion]
            e, one, g, took = portion(service, port, part, chosen.clients, library, outside)
            single, expected, got = single + one, expected + e, got + g
            times.append(took)
            print(f"{start + len(part)}: {took}", flush=True)
        pairs = list(zip(asked, expected, got, strict=True))
        kept = [pair for pair in pairs if pair[0].how != "cancel"]
        lost = [a.number for a, _, g in kept if g.text is None]
        differ = [a for a, e, g in kept if g.text is not None and g.text != e]
        margins = {a.number: margin(model.spec, a) for a in differ}
    report = {
        "cpu": {"model": platform.machine(), "usable": len(os.sched_getaffinity(0))},
        "threads": torch.get_num_threads(),
        "requests": len(asked),
        "clients": chosen.clients,
        "rows": chosen.rows,
        "remember": chosen.remember,
        "questions_per_recording": chosen.per,
        "sampler_presets": sampler_presets,
        "answered": len(kept) - len(lost),
        "cancelled": len(pairs) - len(kept),
        "lost": lost,
        "differing": len(differ),
        "undecided": sum(value < CLOSE for value in margins.values()),
        "wrong": [number for number, value in margins.items() if value >= CLOSE],
        "margins": margins,
        "alone_per_s": round(len(kept) / sum(took.alone for took in times), 3),
        "one_client_per_s": round(len(kept) / sum(took.single for took in times), 3),
        "together_per_s": round(len(kept) / sum(took.together for took in times), 3),
        "ratio": ratio([took.alone for took in times], [took.together for took in times]),
        "ratio_to_one_client": ratio(
            [took.single for took in times], [took.together for took in times]
        ),
        "ratio_median": round(statistics.median(t.alone / t.together for t in times), 3),
        "ratio_to_one_client_median": round(
            statistics.median(t.single / t.together for t in times), 3
        ),
        "times_s": [took._asdict() for took in times],
        "rows_per_forward": round(
            sum(took.rows for took in times) / sum(took.num_forwards for took in times), 2
        ),
        "one_client_differing": sum(
            one.text != e for one, (_, e, _) in zip(single, kept, strict=True)
        ),
        **summary(got),
    }
    write(report, chosen.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
