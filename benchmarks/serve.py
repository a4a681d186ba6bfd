"""Many clients at once or one at a time: equal answers, throughput, waiting times.

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
import functools
import http.client
import json
import os
import platform
import random
import statistics
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import torch
from reports import RESULTS, run_server, write_report

import diffa
from diffa.nano.sources import Nano
from diffa.runtime.threads import single_core
from diffa.serving.limits import Limits
from diffa.serving.service import Service

CLOSE = 1e-5
_MODELS: dict[str, Any] = {}  # of the library's process


class Request(NamedTuple):
    """One request of the mix; ``how`` is "whole", "stream" or "cancel"."""

    number: int
    clip: Path
    question: str
    tokens: int
    sampler_preset: str
    how: str


class Response(NamedTuple):
    """The text (None: cancelled or lost), the seconds, and the seconds to the first text."""

    text: str | None
    seconds: float
    first: float | None


class Times(NamedTuple):
    """Seconds of a portion by the clock; ``single`` is the server with one client, who cancels
    nothing. What the server ran for all clients: ``num_forwards``, and ``rows`` in them."""

    alone: float
    single: float
    together: float
    num_forwards: int
    rows: int


def ratio(one: list[float], many: list[float]) -> float:
    """How many times faster."""
    return round(sum(one) / sum(many), 3)


def mix(count: int, folder: Path, sampler_presets: list[str], seed: int, per: int) -> list[Request]:
    """Requests: two thirds short, one third long; a third streamed, a tenth cancelled. ``per``
    questions are about the same recording."""
    source, rng = (
        Nano(split="test", seed=seed, count=count, samples_per_utterance=per),
        random.Random(seed),
    )
    requests = []
    for number in range(count):
        sample = source[number]
        clip = folder / f"{number}.wav"
        audio: Any = sample.audio
        soundfile.write(clip, audio.numpy(), sample.rate or 16000, subtype="FLOAT")
        how = rng.choices(["whole", "stream", "cancel"], [57, 33, 10])[0]
        tokens = rng.choice([8, 16, 48])
        requests.append(
            Request(number, clip, sample.question, tokens, rng.choice(sampler_presets), how)
        )
    return requests


def body_of(request: Request) -> str:
    """Return the body of a request."""
    audio = {"data": base64.b64encode(request.clip.read_bytes()).decode(), "format": "wav"}
    parts = [
        {"type": "input_audio", "input_audio": audio},
        {"type": "text", "text": request.question},
    ]
    body = {
        "model": f"nano:{request.sampler_preset}",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": request.tokens,
        "stream": request.how != "whole",
    }
    return json.dumps(body)


def ask(port: int, request: Request, body: str) -> Response:
    """Send one request and read the response, whole or as a stream."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", body)
        if request.how == "cancel":
            time.sleep(random.Random(request.number).uniform(0, 2))
            return Response(None, time.perf_counter() - start, None)
        reply = connection.getresponse()
        if reply.status != 200:
            return Response(None, time.perf_counter() - start, None)
        if request.how == "whole":
            text = json.loads(reply.read())["choices"][0]["message"]["content"]
            return Response(text, time.perf_counter() - start, None)
        return read_stream(reply, start)
    finally:
        connection.close()


def read_stream(reply: http.client.HTTPResponse, begin: float) -> Response:
    """Join the pieces of a stream."""
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
            first = first or time.perf_counter() - begin
            text += piece
    return Response(text if ended else None, time.perf_counter() - begin, first)


def answer_alone(part: list[Request]) -> tuple[dict[int, str], float]:
    """The library's answers to requests by themselves, and the seconds; runs in the library's own
    process."""
    if not _MODELS:
        model = diffa.build("nano")
        known = model.spec.data["sampler_presets"]
        _MODELS.update({name: diffa.swap(model, sampler=known[name]) for name in known})
        answer(part[0])
    start = time.perf_counter()
    texts = {request.number: answer(request) for request in part}
    return texts, time.perf_counter() - start


def answer(request: Request) -> str:
    """The library's answer to one request."""
    model = _MODELS[request.sampler_preset]
    text: str = model.answer(request.clip, request.question, max_tokens=request.tokens).text
    return text


def margin(spec: Any, request: Request) -> float:
    """The closest choice while the request is decoded in float64: between two tokens of a slot,
    or between accepting a slot and not."""
    model = diffa.build(spec, dtype="float64")
    model = diffa.swap(model, sampler=model.spec.data["sampler_presets"][request.sampler_preset])
    head, closest = model.backbone.head, [float("inf")]
    rule = model.sampler.rule

    def record_margin(hidden: Any) -> Any:
        logits = head(hidden)
        scores = logits.clone().flatten(0, -2)
        scores[:, model.backbone.vocab.mask] = -torch.inf
        top = torch.softmax(scores, dim=-1).topk(2, dim=-1).values
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

    model.backbone.head = record_margin
    model.answer(request.clip, request.question, max_tokens=request.tokens)
    return closest[0]


def crowd(port: int, part: list[Request], clients: int) -> tuple[list[Response], float]:
    """Send requests, so many at a time, and count the seconds from the first to the last; runs in
    the clients' own process. What is sent is written before."""
    bodies = [body_of(request) for request in part]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        responses = list(pool.map(functools.partial(ask, port), part, bodies))
    return responses, time.perf_counter() - start


def portion(
    service: Service,
    port: int,
    part: list[Request],
    clients: int,
    library: Executor,
    outside: Executor,
) -> tuple[list[str | None], list[Response], list[Response], Times]:
    """Texts of a portion alone, what one client got, what all of them got, and the times; the
    first two leave out what will be cancelled."""
    completed = [request for request in part if request.how != "cancel"]
    texts, by_itself = library.submit(answer_alone, completed).result()
    single, one_by_one = outside.submit(crowd, port, completed, 1).result()
    before = service.engine.load()
    responses, all_at_once = outside.submit(crowd, port, part, clients).result()
    load = service.engine.load()
    ran = load.num_forwards - before.num_forwards, load.num_rows - before.num_rows
    took = Times(by_itself, one_by_one, all_at_once, *ran)
    return [texts.get(request.number) for request in part], single, responses, took


def summary(responses: list[Response]) -> dict[str, float]:
    """Median and 95th percentile of seconds."""
    waits = sorted(one.seconds for one in responses if one.text is not None)
    firsts = sorted(one.first for one in responses if one.first is not None)

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
    args = parser.parse_args()
    with single_core():
        model = diffa.build("nano")
    sampler_presets = args.sampler_presets.split(",")
    limits = Limits(
        max_batch_size=args.rows,
        max_waiting=max(64, 2 * args.clients),
        deadline=600,
        cached_embeddings=args.remember,
    )
    service = Service(model, "nano", limits=limits)
    expected: list[str | None] = []
    single: list[Response] = []
    responses: list[Response] = []
    times: list[Times] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as library,
        ProcessPoolExecutor(1, get_context("spawn")) as outside,
        run_server(service) as (_, port),
    ):
        with single_core():
            requests = mix(args.requests, Path(folder), sampler_presets, 0, args.per)
        portion(service, port, requests[: args.rows], args.clients, library, outside)  # warm-up
        for start in range(0, len(requests), args.portion):
            part = requests[start : start + args.portion]
            e, one, g, took = portion(service, port, part, args.clients, library, outside)
            single, expected, responses = single + one, expected + e, responses + g
            times.append(took)
            print(f"{start + len(part)}: {took}", flush=True)
        pairs = list(zip(requests, expected, responses, strict=True))
        completed = [pair for pair in pairs if pair[0].how != "cancel"]
        lost = [a.number for a, _, g in completed if g.text is None]
        differ = [a for a, e, g in completed if g.text is not None and g.text != e]
        margins = {a.number: margin(model.spec, a) for a in differ}
    report = {
        "cpu": {"model": platform.machine(), "usable": len(os.sched_getaffinity(0))},
        "threads": torch.get_num_threads(),
        "requests": len(requests),
        "clients": args.clients,
        "rows": args.rows,
        "remember": args.remember,
        "questions_per_recording": args.per,
        "sampler_presets": sampler_presets,
        "answered": len(completed) - len(lost),
        "cancelled": len(pairs) - len(completed),
        "lost": lost,
        "differing": len(differ),
        "undecided": sum(value < CLOSE for value in margins.values()),
        "wrong": [number for number, value in margins.items() if value >= CLOSE],
        "margins": margins,
        "alone_per_s": round(len(completed) / sum(took.alone for took in times), 3),
        "one_client_per_s": round(len(completed) / sum(took.single for took in times), 3),
        "together_per_s": round(len(completed) / sum(took.together for took in times), 3),
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
            one.text != e for one, (_, e, _) in zip(single, completed, strict=True)
        ),
        **summary(responses),
    }
    write_report(report, args.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
