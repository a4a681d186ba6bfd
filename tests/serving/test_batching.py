"""Requests that share forward passes get the answers that they get alone, with any sampler."""

import itertools
import random
import threading
import time
from queue import SimpleQueue

import pytest
import torch
from helpers.small import MASK, backbone
from hypothesis import given
from hypothesis import strategies as st
from test_combinations import QWEN

from diffa.backbones.sdar import SDAR
from diffa.canvas.batch import initial_answer, insert_audio
from diffa.canvas.canvas import Canvas
from diffa.canvas.denoiser import Denoiser
from diffa.errors import AudioError, SpecError
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.growing import Growing
from diffa.samplers.prophet import Prophet
from diffa.samplers.remdm import ReMDM
from diffa.samplers.revise import Revise
from diffa.samplers.speculative import Speculative
from diffa.samplers.wino import Wino
from diffa.serving.batched_forward import _PASS_COST, plan_passes
from diffa.serving.encoder_cache import EncoderCache
from diffa.serving.engine import Engine
from diffa.serving.errors import RequestError
from diffa.serving.requests import (
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestHandle,
    StartedEvent,
    StepEvent,
)
from diffa.serving.worker import Worker
from diffa.types import Embeds, block_attention

SAMPLERS = {
    "plain": (Blockwise, {"block_length": 4}),
    "steps": (Blockwise, {"block_length": 4, "steps": 7}),
    "drawn": (Blockwise, {"block_length": 4, "temperature": 0.8}),
    "random order": (Blockwise, {"block_length": 4, "ranking": "random"}),
    "prefix": (Blockwise, {"block_length": 4, "threshold": 0.3, "cache": "prefix"}),
    "dual": (Blockwise, {"block_length": 4, "factor": 1.0, "cache": "dual", "vicinity_window": 2}),
    "suffix window": (Blockwise, {"block_length": 4, "suffix_window": 2}),
    "audio": (Blockwise, {"block_length": 4, "audio_refresh_interval": 3}),
    "drift": (Blockwise, {"block_length": 4, "cache": "dual", "drift_threshold": 0.01}),
    "guided": (Blockwise, {"block_length": 4, "cfg_scale": 0.5, "cfg_drop": "audio"}),
    "credit": (Blockwise, {"block_length": 4, "threshold": 0.5, "credit_strength": 0.5}),
    "wino": (Wino, {"block_length": 4}),
    "remdm": (ReMDM, {"block_length": 4}),
    "prophet": (Prophet, {"block_length": 4}),
    "growing": (Growing, {"block_length": 4, "initial_length": 4, "threshold": 0.5}),
    "speculative": (Speculative, {"block_length": 4}),
    "revise": (Revise, {"block_length": 4}),
}


class EmbeddingModel:
    """What the engine needs of a model: the "recordings" are embeddings laid flat."""

    sample_rate = 32

    def __init__(self, double=True):
        self.backbone = backbone().double() if double else backbone()
        self.encoder = self
        self.device = torch.device("cpu")

    def listen(self, audio, lengths):
        values = audio.view(len(audio), -1, 32).to(self.backbone.wte.weight.dtype)
        return Embeds(values, lengths // 32)


@pytest.fixture(scope="module")
def model():
    made = EmbeddingModel.__new__(EmbeddingModel)
    EmbeddingModel.__init__(made)
    made.backbone.wte = made.backbone.transformer.wte
    return made


@pytest.fixture(scope="module")
def block_model():
    """The same with a block-causal backbone, whose blocks count from position 0."""
    made = EmbeddingModel()
    config = QWEN | {"hidden_size": 32, "mask_token_id": MASK}
    made.backbone = SDAR(config=config).double().eval().requires_grad_(False)
    made.backbone.wte = made.backbone.transformer.wte
    generator = torch.Generator().manual_seed(2)
    for weight in made.backbone.parameters():
        if weight.dim() == 2:
            weight.normal_(0, 2 * weight.shape[1] ** -0.5, generator=generator)
    return made


def job(sampler, kind, seed, rng, length=None):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 30, (rng.randint(2, 9),), generator=generator)
    heard = rng.choice([0, 3, 8, 20])
    wave = torch.randn(heard * 32, generator=generator) if heard else None
    return GenerationRequest(
        prompt, wave, rng.randint(0, 2), length or rng.choice([6, 12]), sampler, kind, seed=seed
    )


def alone(model, request):
    heard = None if request.waveform is None else request.waveform.view(-1, 32).double()
    embed, vocab = model.backbone.embed, model.backbone.vocab
    embeds, text = insert_audio([request.prompt], [heard], [request.audio_at], embed)
    answer = initial_answer([None], request.max_tokens, vocab)
    board = Canvas(
        embeds, text, answer, embed=embed, vocab=vocab, seeds=torch.tensor([request.seed]),
        attention=block_attention(model.backbone),
    )  # fmt: skip
    denoise = Denoiser(model.backbone, board)
    with torch.no_grad():
        steps = sum(1 for _ in request.sampler(board, denoise))
    return board.answer[0, : board.requested].tolist(), steps


def answered(engine, jobs):
    """Submit all and collect how each ended."""
    ends = SimpleQueue()
    for index, request in enumerate(jobs):
        engine.submit(RequestHandle(request, lambda event, i=index: ends.put((i, event)), 60))
    found = {}
    while len(found) < len(jobs):
        index, event = ends.get(timeout=60)
        if isinstance(event, FinishedEvent | FailedEvent):
            found[index] = event
    return [found[index] for index in range(len(jobs))]


def made(model, name):
    cls, options = SAMPLERS[name]
    return cls(model.backbone.vocab, **options)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_decodes_each_request_as_it_decodes_alone(model, name, workers):
    rng = random.Random(name)
    sampler = made(model, name)
    jobs = [job(sampler, name, seed, rng) for seed in range(7)]
    engine = Engine(model, max_batch_size=4, num_workers=workers)
    try:
        ends = answered(engine, jobs)
    finally:
        engine.close()
    for request, end in zip(jobs, ends, strict=True):
        assert (end.tokens.tolist(), end.num_forwards) == alone(model, request)


@pytest.mark.parametrize("workers", [1, 2])
def test_questions_about_a_recording_share_what_a_block_causal_model_reads(block_model, workers):
    """The recording is read once; every answer is the one that the question gets alone."""
    sampler = Blockwise(block_model.backbone.vocab, threshold=0.4, cache="prefix")
    generator = torch.Generator().manual_seed(9)
    wave, start = torch.randn(14 * 32, generator=generator), torch.arange(5)
    jobs = [
        GenerationRequest(torch.cat([start, torch.tensor([9, n])]), wave, 2, 9, sampler, "block")
        for n in range(6)
    ]
    engine = Engine(block_model, max_batch_size=4, num_workers=workers, cached_embeddings=100)
    try:
        ends = answered(engine, jobs[:1]) + answered(engine, jobs[1:])
        prefixes = engine.encoder_cache.prefix_cache
    finally:
        engine.close()
    for request, end in zip(jobs, ends, strict=True):
        assert end.tokens.tolist() == alone(block_model, request)[0]
    assert prefixes.reused == 5 * (20 // 4)
    assert prefixes.size <= prefixes.max_bytes


def test_different_samplers_share_forward_passes_and_decode_as_alone(model):
    rng = random.Random(1)
    names = list(SAMPLERS)
    samplers = {name: made(model, name) for name in names}
    chosen = [rng.choice(names) for _ in range(40)]
    jobs = [job(samplers[name], name, seed, rng) for seed, name in enumerate(chosen)]
    engine = Engine(model, max_batch_size=16)
    try:
        ends = answered(engine, jobs)
        load = engine.load()
    finally:
        engine.close()
    for request, end in zip(jobs, ends, strict=True):
        assert (end.tokens.tolist(), end.num_forwards) == alone(model, request), request.sampler_key
    assert load.num_rows > 4 * load.num_forwards, "forwards were hardly shared"


def test_canvases_of_a_worker_run_one_at_a_time_between_passes(model, monkeypatch):
    now, most, steps = [], [], []

    def head(self, hidden):
        now.append(1)
        time.sleep(0.003)  # long enough for another canvas to come, if it may
        most.append(len(now))
        steps.append(len(hidden))
        now.pop()
        return self._backbone.head(hidden)

    monkeypatch.setattr("diffa.serving.batch.BackboneProxy.head", head)
    rng, names = random.Random(4), ["plain", "steps", "drawn", "prefix"]
    jobs = [job(made(model, name), name, 1, rng) for name in names]
    engine = Engine(model, max_batch_size=8, num_workers=1)
    try:
        answered(engine, jobs)
        shared = engine.load().num_rows
    finally:
        engine.close()
    assert sum(steps) == shared > len(jobs), "the four did not share one worker"
    assert max(most) == 1


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_run_in_parallel_and_share_the_queue(model, workers):
    meet = threading.Barrier(workers)  # passed only when as many forwards run at once
    rng, sampler, body = random.Random(3), made(model, "plain"), model.backbone.forward
    seen = set()

    def forward(*call):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            meet.wait(20)
        return body(*call)

    jobs = [job(sampler, "plain", seed, rng, 12) for seed in range(2 * workers)]
    expected = [alone(model, request) for request in jobs]
    model.backbone.forward = forward
    rows = []
    engine = Engine(
        model,
        max_batch_size=4 * workers,
        num_workers=workers,
        on_forward=lambda n, _: rows.append(n),
    )
    ends = SimpleQueue()
    try:
        with engine._changed:  # all come at once
            for index, request in enumerate(jobs):
                engine.submit(
                    RequestHandle(request, lambda event, i=index: ends.put((i, event)), 60)
                )
        found = dict(ends.get(timeout=60) for _ in range(2 * len(jobs)))  # begun, then done
    finally:
        engine.close()
        del model.backbone.forward
    load = engine.load()
    assert len(seen) == workers and max(rows) == 2 and not meet.broken
    assert [(found[i].tokens.tolist(), found[i].num_forwards) for i in range(len(jobs))] == expected
    assert (load.num_forwards, load.num_rows) == (len(rows), sum(rows))
    assert not engine.alive


def test_an_engine_has_one_worker_per_core_with_enough_rows_each(model, monkeypatch):
    def workers(cores, rows, **options):
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        engine = Engine(model, max_batch_size=rows, **options)
        engine.close()
        return [worker.max_batch_size for worker in engine._workers]

    assert workers(1, 16) == [16]
    assert workers(2, 16) == [8, 8]
    assert workers(8, 16) == [4] * 4
    assert workers(2, 7) == [7]
    assert workers(2, 9) == [4, 5]
    assert workers(2, 3, num_workers=9) == [1, 1, 1]
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    assert workers(8, 16) == [16]


def test_the_first_worker_has_the_cores_that_no_other_uses(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    used: dict[int, list[int]] = {}

    def note(count):
        if threading.current_thread().name == "worker":
            used.setdefault(threading.get_ident(), []).append(count)

    monkeypatch.setattr(torch, "set_num_threads", note)
    slow = PausedBlockwise(model.backbone.vocab)
    engine, ends, other = (
        Engine(model, max_batch_size=8, num_workers=2),
        SimpleQueue(),
        SimpleQueue(),
    )
    rng = random.Random(4)
    try:
        engine.submit(RequestHandle(job(slow, "slow", 1, rng, 12), ends.put, 60))
        while engine.load().num_forwards < 2:
            pass
        (first,) = used
        assert first == engine._workers[0].thread.ident
        assert set(used[first]) == {4}
        plain = made(model, "plain")
        engine.submit(RequestHandle(job(plain, "plain", 2, rng, 12), other.put, 60))
        while not isinstance(other.get(timeout=60), FinishedEvent):
            pass
        (second,) = set(used) - {first}
        assert set(used[second]) == {2}  # the first waits at its gate, and counts
        slow.gate.set()
        while not isinstance(ends.get(timeout=60), FinishedEvent):
            pass
    finally:
        engine.close()
    assert used[first][-1] == 3  # the other worker has a team now, whose second thread counts
    for worker in engine._workers:
        worker.idle = True
    assert [engine._num_threads(number) for number in range(2)] == [3, 2], "the second's team grows"


def test_single_requests_always_go_to_the_first_worker(model, monkeypatch):
    """Threads that compute on several cores slow each other down, even while they wait."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    used: dict[str, set[int]] = {}

    def note(count):
        used.setdefault(threading.current_thread().name.split("_")[0], set()).add(count)

    monkeypatch.setattr(torch, "set_num_threads", note)
    engine, rng, plain = Engine(model, max_batch_size=8), random.Random(5), made(model, "plain")
    assert [worker.max_batch_size for worker in engine._workers] == [4, 4]
    begun = set[Worker]()
    opened = Worker._start_batches

    def note_worker(worker, new):
        begun.add(worker)
        opened(worker, new)

    monkeypatch.setattr(Worker, "_start_batches", note_worker)
    try:
        for seed in range(12):
            ends = SimpleQueue()
            engine.submit(RequestHandle(job(plain, "plain", seed, rng, 6), ends.put, 60))
            while not isinstance(ends.get(timeout=60), FinishedEvent):
                pass
            while engine.load().num_running or not engine._workers[0].idle:
                time.sleep(0.001)
    finally:
        engine.close()
    assert begun == {engine._workers[0]}
    assert used["worker"] == {2} and used["sampler"] == {1}


def test_the_queue_is_split_between_workers_that_have_room(model):
    class Running:
        num_active, handles = 1, ()

    engine = Engine(model, max_batch_size=16, num_workers=2)
    engine.close()  # its threads are gone: what they would take is request below
    sampler, rng = made(model, "plain"), random.Random(9)
    for worker in engine._workers:
        worker.batches.append(Running())
    waiting = [RequestHandle(job(sampler, "plain", i, rng, 6), print, 60) for i in range(5)]
    engine._queue.extend(waiting[:2])
    assert [engine._admit(worker) for worker in engine._workers] == [waiting[:1], waiting[1:2]]
    for worker in engine._workers:
        worker.batches[0].num_active = 7  # room for one each: not worth a canvas while two wait
    engine._queue.extend(waiting[2:])
    assert [engine._admit(worker) for worker in engine._workers] == [[], []]


def test_requests_that_can_share_a_canvas_are_admitted_together(model):
    engine = Engine(model, max_batch_size=8, num_workers=1)
    engine.close()
    (worker,), rng = engine._workers, random.Random(2)
    shapes = [("plain", 6), ("plain", 9), ("drawn", 6), ("plain", 6), ("plain", 9), ("plain", 6)]
    queue = [
        RequestHandle(job(made(model, name), name, i, rng, tokens), print, 60)
        for i, (name, tokens) in enumerate(shapes)
    ]
    worker.max_batch_size = 4
    engine._queue.extend(queue)
    assert engine._admit(worker) == [queue[i] for i in (0, 3, 5, 1)]
    assert list(engine._queue) == [queue[2], queue[4]], "who waits longest is not first any more"
    assert engine._admit(worker) == [queue[2], queue[4]] and not engine._queue


@pytest.mark.parametrize("before", [False, True])
def test_a_worker_that_dies_fails_its_requests_and_is_replaced(model, monkeypatch, caplog, before):
    """Whether its canvases have their forward by then, or wait for it."""
    calls = []

    def fail(*_):
        calls.append(1)
        raise ValueError("a fault of the observer")

    if before:
        monkeypatch.setattr(Worker, "_run_backbone", fail)
    engine, ends = Engine(model, max_batch_size=4, on_forward=fail), SimpleQueue()
    try:
        request = job(made(model, "plain"), "plain", 3, random.Random(3), 6)
        engine.submit(RequestHandle(request, ends.put, 60))
        assert ends.get(timeout=20) == StartedEvent()
        end = ends.get(timeout=20)
        assert isinstance(end, FailedEvent) and "the observer" in str(end.error)
        assert len(calls) == 1
        monkeypatch.undo()
        engine._on_forward = None
        (answer,) = answered(engine, [request])
        assert answer.tokens.tolist() == alone(model, request)[0] and engine.alive
    finally:
        engine.close()
    for thread in engine._sampler_threads._threads:
        thread.join(20)
        assert not thread.is_alive(), "a canvas waits for ever, and the process with it"
    assert logged(caplog, "a worker ends") == [True]


def test_another_worker_takes_over_when_the_first_dies(model, monkeypatch):
    engine, rng = Engine(model, max_batch_size=8, num_workers=2), random.Random(3)
    engine.close()  # its threads are gone: their turns are taken below
    engine._closed = False
    first, second = engine._workers
    first.idle = True
    main, purge = threading.current_thread(), engine._drop_ended

    def fail():
        if threading.current_thread() is main:
            raise ValueError("a fault while nothing was begun")
        purge()

    monkeypatch.setattr(engine, "_drop_ended", fail)
    handle = RequestHandle(job(made(model, "plain"), "plain", 3, rng, 6), print, 60)
    engine._queue.append(handle)
    taken = SimpleQueue()
    other = threading.Thread(target=lambda: taken.put(engine._next_requests(second)), daemon=True)
    other.start()
    while not engine._changed._waiters:  # it leaves what comes to the first
        time.sleep(0.001)
    with pytest.raises(ValueError, match="nothing was begun"):
        engine._next_requests(first)
    assert taken.get(timeout=20) == [handle]
    other.join()


def test_a_worker_computes_the_heads_of_its_canvases(model):
    """It has the cores for what is large in a large model."""
    seen = []
    hook = model.backbone.head.register_forward_hook(
        lambda *_: seen.append(threading.current_thread().name)
    )
    engine = Engine(model, max_batch_size=4)
    try:
        answered(engine, [job(made(model, "plain"), "plain", 3, random.Random(3), 6)])
    finally:
        engine.close()
        hook.remove()
    assert set(seen) == {"worker"}


class Fake:
    """As much of a call as decides what it shares a pass with."""

    def __init__(self, wide: int, slots: int | None = None, rows: int = 1) -> None:
        self.embeds, self.context = torch.zeros(rows, wide, 2), self
        self.query_slots, self.branch, self.attn_mask, self.output_slots = slots, None, None, 1


def test_whole_and_partial_canvases_never_share_a_pass():
    calls = [Fake(40), Fake(4, 1), Fake(41), Fake(6, 1), Fake(9, 1), Fake(10)]
    assert plan_passes(calls) == [[2, 0, 5], [4, 3, 1]]
    assert plan_passes([]) == []


def test_calls_are_padded_only_while_that_is_cheaper_than_another_pass():
    assert plan_passes([Fake(100), Fake(195)]) == [[1, 0]]  # 95 slots of padding
    assert plan_passes([Fake(100), Fake(197)]) == [[1], [0]]  # 97
    assert plan_passes([Fake(100, rows=3), Fake(140)]) == [[1], [0]]  # 120 for the three together


def test_whole_canvases_share_one_pass_where_padding_costs_nothing():
    calls = [Fake(10), Fake(400), Fake(4, 1), Fake(90)]
    with torch.no_grad():
        assert plan_passes(calls, ragged=True) == [[0, 1, 3], [2]]
        calls[1].attn_mask = torch.ones(1)  # its mask cannot be packed
        assert plan_passes(calls, ragged=True) == [[0, 3], [1], [2]]
    assert plan_passes(calls, ragged=True) == plan_passes(
        calls
    )  # gradients are wanted: nothing is packed


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 4)), min_size=1, max_size=7))
def test_plan_passes_finds_the_cheapest_partition_by_length(sizes):
    calls = [Fake(wide, rows=rows) for wide, rows in sizes]

    def cost(division):
        return sum(
            _PASS_COST + max(sizes[i][0] for i in group) * sum(sizes[i][1] for i in group)
            for group in division
        )

    found = plan_passes(calls)
    assert sorted(i for group in found for i in group) == list(range(len(sizes)))
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i][0])
    cuts = range(1, len(order))
    for count in range(len(order)):
        for ends in itertools.combinations(cuts, count):
            parts = [order[a:b] for a, b in itertools.pairwise((0, *ends, len(order)))]
            assert cost(found) <= cost(parts)


class PausedBlockwise(Blockwise):
    """Waits before its third forward until it may go on."""

    def __init__(self, vocab):
        super().__init__(vocab, block_length=4)
        self.gate = threading.Event()

    def __call__(self, canvas, denoise):
        for count, step in enumerate(super().__call__(canvas, denoise)):
            yield step
            if count == 1:
                self.gate.wait(20)


def test_a_request_joins_while_another_is_being_answered(model):
    rng = random.Random(2)
    slow, quick = PausedBlockwise(model.backbone.vocab), made(model, "plain")
    first, second = job(slow, "slow", 1, rng, 12), job(quick, "plain", 2, rng, 6)
    engine, events = Engine(model, max_batch_size=4), SimpleQueue()
    try:
        engine.submit(RequestHandle(first, lambda event: events.put(("first", event)), 60))
        while engine.load().num_forwards < 2:
            pass
        engine.submit(RequestHandle(second, lambda event: events.put(("second", event)), 60))
        slow.gate.set()
        order = []
        while len(order) < 2:
            name, event = events.get(timeout=60)
            if isinstance(event, FinishedEvent):
                order.append(name)
                expected = alone(model, {"first": first, "second": second}[name])
                assert (event.tokens.tolist(), event.num_forwards) == expected
        assert order == ["second", "first"], "the short one did not leave first"
    finally:
        engine.close()


def test_a_streamed_request_receives_every_step_and_then_the_answer(model):
    request = job(made(model, "plain"), "plain", 3, random.Random(3), 6)._replace(stream=True)
    engine, events = Engine(model, max_batch_size=4), SimpleQueue()
    try:
        engine.submit(RequestHandle(request, events.put, 60))
        heard = [events.get(timeout=60)]
        while not isinstance(heard[-1], FinishedEvent):
            heard.append(events.get(timeout=60))
    finally:
        engine.close()
    assert isinstance(heard[0], StartedEvent)
    steps_seen = [event for event in heard if isinstance(event, StepEvent)]
    assert [step.num_forwards for step in steps_seen] == list(range(1, heard[-1].num_forwards + 1))
    assert steps_seen[-1].tokens.tolist() == heard[-1].tokens.tolist()


def test_a_cancelled_row_takes_part_in_no_more_passes(model):
    stays, leaves = (job(made(model, "plain"), "plain", i, random.Random(i), 12) for i in (1, 2))
    rows, ends = [], SimpleQueue()
    left = RequestHandle(leaves._replace(stream=True), lambda _: rows and left.cancel(), 60)
    engine = Engine(model, max_batch_size=4, on_forward=lambda count, _: rows.append(count))
    try:
        with engine._changed:  # both come at once, and share a canvas
            engine.submit(left)
            engine.submit(RequestHandle(stays, ends.put, 60))
        assert ends.get(timeout=60) == StartedEvent()
        end = ends.get(timeout=60)
    finally:
        engine.close()
    assert (end.tokens.tolist(), end.num_forwards) == alone(model, stays)
    assert rows[0] == 2 and rows[5:] == [1] * (end.num_forwards - 5)


def test_a_cached_recording_is_encoded_once(model):
    rng, sampler = random.Random(4), made(model, "plain")
    jobs = [job(sampler, "plain", seed, rng, 6) for seed in range(3)]
    wave = torch.randn(5 * 32)
    jobs = [request._replace(waveform=wave) for request in jobs]
    heard, listen = [], model.listen
    model.listen = lambda audio, lengths: heard.append(len(audio)) or listen(audio, lengths)
    try:
        for capacity, expected in {100: 1, 4: 2, 0: 2}.items():
            heard.clear()
            engine = Engine(model, max_batch_size=4, cached_embeddings=capacity)
            ends = answered(engine, jobs[:1]) + answered(engine, jobs[1:])
            engine.close()
            for request, end in zip(jobs, ends, strict=True):
                assert end.tokens.tolist() == alone(model, request)[0]
            assert sum(heard) >= expected
            assert capacity < 5 or sum(heard) == 1
    finally:
        del model.listen


def test_the_encoder_cache_evicts_the_least_recently_used_recording():
    heard = []

    class Listener:
        def listen(self, audio, lengths):
            heard.extend(lengths.tolist())
            return Embeds(torch.ones(len(audio), int(lengths.max()), 2), lengths)

    cache = EncoderCache(Listener(), capacity=9)
    for length in (4, 3, 4, 5, 4, 3):  # the fourth is one too many
        cache.encode([torch.ones(length)])
    assert heard == [4, 3, 5, 3]


class Faulty(Blockwise):
    """Fails at its second step."""

    def __call__(self, canvas, denoise):
        steps = super().__call__(canvas, denoise)
        yield next(steps)
        raise RuntimeError("a fault of this sampler")


def logged(caplog, text):
    """The records that say it, and whether each has a traceback."""
    return [bool(one.exc_info) for one in caplog.records if text in one.getMessage()]


def test_an_error_of_one_request_does_not_fail_the_others(model, caplog):
    rng = random.Random(5)
    faulty, good = Faulty(model.backbone.vocab, block_length=4), made(model, "plain")
    jobs = [job(good, "plain", seed, rng) for seed in range(4)]
    engine = Engine(model, max_batch_size=8)
    try:
        ends = answered(engine, [job(faulty, "faulty", 9, rng), *jobs])
    finally:
        engine.close()
    assert isinstance(ends[0], FailedEvent) and "a fault" in str(ends[0].error)
    assert logged(caplog, "1 requests fail after 1 forward passes: RuntimeError") == [True]
    assert "a fault of this sampler" in caplog.text
    for request, end in zip(jobs, ends[1:], strict=True):
        assert end.tokens.tolist() == alone(model, request)[0]


def test_calls_of_a_failing_pass_are_run_alone(model, caplog):
    rng, sampler = random.Random(6), made(model, "plain")
    jobs = [job(sampler, str(seed), seed, rng, 6) for seed in range(3)]  # a canvas each
    body = model.backbone.forward

    def narrow(embeds, positions, context):
        if len(embeds) > 1:
            raise torch.OutOfMemoryError("too many rows")
        return body(embeds, positions, context)

    model.backbone.forward = narrow
    engine = Engine(model, max_batch_size=4)
    try:
        ends = answered(engine, jobs)
    finally:
        engine.close()
        del model.backbone.forward
    for request, end in zip(jobs, ends, strict=True):
        assert end.tokens.tolist() == alone(model, request)[0]
    told = logged(caplog, "canvases fails, each is run alone: OutOfMemoryError")
    assert told and all(told) and len(told) == len(caplog.records)


@pytest.mark.parametrize(
    ("error", "traceback"),
    [(AudioError("it is silent"), False), (RuntimeError("no encoder"), True)],
)
def test_a_recording_that_cannot_be_encoded_fails_its_request_and_is_logged(
    model, caplog, error, traceback
):
    def fail(audio, lengths):
        raise error

    request = job(made(model, "plain"), "plain", 0, random.Random(1), 6)
    model.listen = fail
    engine = Engine(model, max_batch_size=4)
    try:
        (end,) = answered(engine, [request._replace(waveform=torch.randn(160))])
    finally:
        engine.close()
        del model.listen
    assert end == FailedEvent(error)
    assert logged(caplog, "a recording of 160 samples is not encoded") == [traceback]
    assert str(error) in caplog.text


def test_a_request_longer_than_the_context_fails_and_is_logged(model, caplog):
    request = job(made(model, "plain"), "plain", 0, random.Random(1), 6)
    model.backbone.max_length = 7
    engine = Engine(model, max_batch_size=4)
    try:
        (end,) = answered(engine, [request._replace(prompt=torch.arange(9), waveform=None)])
    finally:
        engine.close()
        del model.backbone.max_length
    assert isinstance(end.error, SpecError)
    assert logged(caplog, f"a request does not begin: {end.error}") == [False]


def test_a_closed_engine_fails_what_is_left_and_refuses_new_requests(model):
    slow, ends = PausedBlockwise(model.backbone.vocab), SimpleQueue()
    engine = Engine(model, max_batch_size=1)
    for seed in range(2):
        engine.submit(RequestHandle(job(slow, "slow", seed, random.Random(7), 12), ends.put, 60))
    while engine.load().num_forwards < 2:
        pass
    threading.Timer(0.2, slow.gate.set).start()
    engine.close()
    failed = [
        event for event in (ends.get(timeout=20) for _ in range(3)) if event != StartedEvent()
    ]
    assert [event.error.status for event in failed] == [503, 503]
    with pytest.raises(RequestError):
        engine.submit(RequestHandle(job(slow, "slow", 3, random.Random(8), 12), ends.put, 60))
    assert not engine.alive
