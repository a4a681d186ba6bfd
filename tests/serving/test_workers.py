"""Workers that die are replaced, and a request that fails in a batch fails alone."""

import random
import threading
from queue import SimpleQueue

import pytest
import torch
from serving.test_batching import EmbeddingModel, alone, answered, job, made

import diffa
from diffa.errors import DiffaError, is_out_of_memory
from diffa.samplers.blockwise import Blockwise
from diffa.serving import run
from diffa.serving.engine import Engine
from diffa.serving.errors import RequestError
from diffa.serving.limits import Limits
from diffa.serving.requests import FailedEvent, FinishedEvent, RequestHandle
from diffa.serving.service import Service


@pytest.fixture(scope="module")
def model():
    made = EmbeddingModel()
    made.backbone.wte = made.backbone.transformer.wte
    return made


class Quitting(Blockwise):
    """Raises SystemExit at its second step."""

    def __call__(self, canvas, denoise):
        yield next(super().__call__(canvas, denoise))
        raise SystemExit(3)


def test_a_sampler_that_exits_fails_its_request_at_once(model):
    engine, rng = Engine(model, max_batch_size=4), random.Random(1)
    quitting = job(Quitting(model.backbone.vocab, block_length=4), "quit", 1, rng, 6)
    ends = SimpleQueue()
    try:
        engine.submit(RequestHandle(quitting, ends.put, 60))
        while not isinstance(end := ends.get(timeout=10), FailedEvent):
            pass
        assert isinstance(end.error, DiffaError) and "SystemExit" in str(end.error)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, ValueError])
def test_after_fifty_deaths_of_workers_every_question_is_answered(model, kind):
    request = job(made(model, "plain"), "plain", 3, random.Random(3), 6)
    deadly = [True]

    def die(*_):
        if deadly[0]:
            raise kind("a fault of the observer")

    engine = Engine(model, max_batch_size=8, num_workers=2, on_forward=die)
    try:
        for _ in range(50):
            (end,) = answered(engine, [request])
            assert isinstance(end, FailedEvent) and isinstance(end.error, Exception)
        deadly.clear()
        deadly.append(False)
        ends = answered(engine, [request] * 5)
        assert engine.alive and {type(end) for end in ends} == {FinishedEvent}
        assert ends[0].tokens.tolist() == alone(model, request)[0]
        workers = [one for one in threading.enumerate() if one.name == "worker"]
        assert len([one for one in workers if one in {w.thread for w in engine._workers}]) == 2
    finally:
        engine.close()


def test_a_request_that_ends_its_worker_fails_alone(model, monkeypatch):
    sampler, rng = made(model, "plain"), random.Random(9)
    jobs = [job(sampler, "plain", seed, rng, 6)._replace(waveform=None) for seed in range(4)]
    deadly = jobs[1]._replace(prompt=torch.cat([torch.tensor([29]), jobs[1].prompt]))
    good = [one._replace(prompt=one.prompt.clamp(max=28)) for one in jobs]
    body, mark, deaths = model.backbone.forward, model.backbone.wte.weight[29].detach(), []

    def end(embeds, positions, context):
        if (embeds[:, 0] == mark).all(dim=1).any():
            deaths.append(len(embeds))
            raise SystemExit(1)
        return body(embeds, positions, context)

    monkeypatch.setattr(model.backbone, "forward", end)
    engine = Engine(model, max_batch_size=4, num_workers=1)
    try:
        ends = answered(engine, [good[0], deadly, good[2], good[3]])
        expected = [alone(model, one)[0] for one in good]
        assert isinstance(ends[1], FailedEvent) and "SystemExit" in str(ends[1].error)
        for index in (0, 2, 3):
            assert ends[index].tokens.tolist() == expected[index]
        assert deaths == [4, 1] and engine.alive
    finally:
        engine.close()


def test_workers_that_cannot_live_fail_the_queue_and_the_engine(model, monkeypatch):
    request = job(made(model, "plain"), "plain", 3, random.Random(3), 6)

    def die(engine, worker):
        while not engine._queue:
            engine._changed.wait()
        raise SystemExit(1)

    monkeypatch.setattr(Engine, "_wait_for_work", die)
    engine, ends = Engine(model, max_batch_size=4, num_workers=1), SimpleQueue()
    try:
        engine.submit(RequestHandle(request, ends.put, 60))
        assert ends.get(timeout=10).error.status == 503
        assert engine.failed and not engine.alive
        with pytest.raises(RequestError, match="ended"):
            engine.submit(RequestHandle(request, ends.put, 60))
    finally:
        engine.close()


def test_one_bad_request_of_a_batch_fails_alone(model, monkeypatch):
    sampler, rng = made(model, "plain"), random.Random(5)
    jobs = [job(sampler, "plain", seed, rng, 6)._replace(waveform=None) for seed in range(4)]
    bad = jobs[2]._replace(prompt=torch.cat([torch.tensor([29]), jobs[2].prompt]))
    good = [one._replace(prompt=one.prompt.clamp(max=28)) for one in jobs]
    body, mark = model.backbone.forward, model.backbone.wte.weight[29].detach()

    def poison(embeds, positions, context):
        bad_rows = (embeds[:, 0] == mark).all(dim=1)
        return body(embeds, positions, context).masked_fill(bad_rows[:, None, None], float("nan"))

    monkeypatch.setattr(model.backbone, "forward", poison)
    engine = Engine(model, max_batch_size=4, num_workers=1)
    try:
        ends = answered(engine, [good[0], good[1], bad, good[3]])
        expected = [alone(model, one)[0] for one in good]
    finally:
        engine.close()
    assert isinstance(ends[2], FailedEvent) and "NaN" in str(ends[2].error)
    for index in (0, 1, 3):
        assert ends[index].tokens.tolist() == expected[index]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
)
def test_a_batch_without_memory_is_halved_and_goes_on(model, monkeypatch, error):
    assert is_out_of_memory(error)
    sampler, rng = made(model, "plain"), random.Random(6)
    jobs = [job(sampler, "plain", seed, rng, 6) for seed in range(8)]
    expected = [alone(model, one)[0] for one in jobs]
    body, rows = model.backbone.forward, []

    def narrow(embeds, positions, context):
        rows.append(len(embeds))
        if len(embeds) > 2:
            raise error
        return body(embeds, positions, context)

    monkeypatch.setattr(model.backbone, "forward", narrow)
    engine, ends = Engine(model, max_batch_size=8, num_workers=1), []
    try:
        ends = answered(engine, jobs)
    finally:
        engine.close()
    assert [end.tokens.tolist() for end in ends] == expected
    assert 2 in rows


def test_a_failed_engine_ends_the_server_with_an_error_and_health_says_so(monkeypatch):
    tiny = diffa.build(diffa.Spec.read("tiny").change({"prompt.max_tokens": 8}))
    service = Service(tiny, "tiny", limits=Limits(drain_timeout=0.2))
    service.engine.failed = True
    with pytest.raises(DiffaError, match="workers"):
        run.run_server(service, run.bind_socket("127.0.0.1", 0))


def test_a_stream_whose_batch_is_retried_takes_no_token_back(model, monkeypatch):
    sampler, rng = made(model, "drawn"), random.Random(8)
    jobs = [job(sampler, "drawn", seed, rng, 12)._replace(stream=True) for seed in range(2)]
    expected = [alone(model, one)[0] for one in jobs]
    body, rows, steps = model.backbone.forward, [], ([], [])

    def fail_once(embeds, positions, context):
        rows.append(len(embeds))
        if len(rows) in (4, 5):  # the shared pass, and its repetition
            raise torch.OutOfMemoryError("out of memory")
        return body(embeds, positions, context)

    monkeypatch.setattr(model.backbone, "forward", fail_once)
    engine, ended = Engine(model, max_batch_size=4, num_workers=1), SimpleQueue()
    try:
        with engine._changed:  # both are admitted together
            for one, collected in zip(jobs, steps, strict=True):

                def record(event, collected=collected):
                    collected.append(event)
                    if isinstance(event, FinishedEvent | FailedEvent):
                        ended.put(event)

                engine.submit(RequestHandle(one, record, 60))
        for _ in jobs:
            assert isinstance(ended.get(timeout=30), FinishedEvent)
    finally:
        engine.close()
    assert rows[3:5] == [2, 2] and rows[5] == 2  # the two canvases of one row share passes
    for collected, tokens in zip(steps, expected, strict=True):
        assert collected[-1].tokens.tolist() == tokens
        for step in collected[1:-1]:
            final = step.final.nonzero()[:, 0].tolist()
            assert [step.tokens[at].item() for at in final] == [tokens[at] for at in final]
