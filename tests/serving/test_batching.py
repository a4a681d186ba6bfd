"""Requests that share forwards get what they would get alone, whatever decodes them."""

import itertools
import random
import threading
import time
from queue import SimpleQueue

import pytest
import torch
from helpers.small import backbone
from hypothesis import given
from hypothesis import strategies as st

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
from diffa.serving.batched_forward import _PASS, groups
from diffa.serving.encoder_cache import Ears
from diffa.serving.engine import Engine
from diffa.serving.errors import RequestError
from diffa.serving.requests import Begun, Done, Failed, Job, Moment, Ticket
from diffa.serving.worker import Lane
from diffa.types import Embeds

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


class Ear:
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
    made = Ear.__new__(Ear)
    Ear.__init__(made)
    made.backbone.wte = made.backbone.transformer.wte
    return made


def job(sampler, kind, seed, rng, length=None):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 30, (rng.randint(2, 9),), generator=generator)
    heard = rng.choice([0, 3, 8, 20])
    wave = torch.randn(heard * 32, generator=generator) if heard else None
    return Job(
        prompt, wave, rng.randint(0, 2), length or rng.choice([6, 12]), sampler, kind, seed=seed
    )


def alone(model, asked):
    heard = None if asked.wave is None else asked.wave.view(-1, 32).double()
    embed, vocab = model.backbone.embed, model.backbone.vocab
    embeds, text = insert_audio([asked.prompt], [heard], [asked.audio_at], embed)
    answer = initial_answer([None], asked.max_tokens, vocab)
    board = Canvas(embeds, text, answer, embed=embed, vocab=vocab, seeds=torch.tensor([asked.seed]))
    denoise = Denoiser(model.backbone, board)
    with torch.no_grad():
        steps = sum(1 for _ in asked.sampler(board, denoise))
    return board.answer[0].tolist(), steps


def answered(engine, jobs):
    """Submit all and collect how each ended."""
    ends = SimpleQueue()
    for index, asked in enumerate(jobs):
        engine.submit(Ticket(asked, lambda event, i=index: ends.put((i, event)), 60))
    found = {}
    while len(found) < len(jobs):
        index, event = ends.get(timeout=60)
        if isinstance(event, Done | Failed):
            found[index] = event
    return [found[index] for index in range(len(jobs))]


def made(model, name):
    cls, options = SAMPLERS[name]
    return cls(model.backbone.vocab, **options)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_decodes_in_company_as_alone(model, name, lanes):
    rng = random.Random(name)
    sampler = made(model, name)
    jobs = [job(sampler, name, seed, rng) for seed in range(7)]
    engine = Engine(model, rows=4, lanes=lanes)
    try:
        ends = answered(engine, jobs)
    finally:
        engine.close()
    for asked, end in zip(jobs, ends, strict=True):
        assert (end.tokens.tolist(), end.num_forwards) == alone(model, asked)


def test_different_samplers_share_forwards_and_still_decode_as_alone(model):
    rng = random.Random(1)
    names = list(SAMPLERS)
    samplers = {name: made(model, name) for name in names}
    chosen = [rng.choice(names) for _ in range(40)]
    jobs = [job(samplers[name], name, seed, rng) for seed, name in enumerate(chosen)]
    engine = Engine(model, rows=16)
    try:
        ends = answered(engine, jobs)
        load = engine.load()
    finally:
        engine.close()
    for asked, end in zip(jobs, ends, strict=True):
        assert (end.tokens.tolist(), end.num_forwards) == alone(model, asked), asked.kind
    assert load.rows > 4 * load.num_forwards, "forwards were hardly shared"


def test_the_canvases_of_a_lane_take_turns_between_forwards(model, monkeypatch):
    now, most, steps = [], [], []

    def head(self, hidden):
        now.append(1)
        time.sleep(0.003)  # long enough for another canvas to come, if it may
        most.append(len(now))
        steps.append(len(hidden))
        now.pop()
        return self._backbone.head(hidden)

    monkeypatch.setattr("diffa.serving.batch.Shared.head", head)
    rng, names = random.Random(4), ["plain", "steps", "drawn", "prefix"]
    jobs = [job(made(model, name), name, 1, rng) for name in names]
    engine = Engine(model, rows=8, lanes=1)
    try:
        answered(engine, jobs)
        shared = engine.load().rows
    finally:
        engine.close()
    assert sum(steps) == shared > len(jobs), "the four did not share one lane"
    assert max(most) == 1


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes_run_beside_each_other_and_split_what_there_is(model, lanes):
    meet = threading.Barrier(lanes)  # passed only when as many forwards run at once
    rng, sampler, body = random.Random(3), made(model, "plain"), model.backbone.forward
    seen = set()

    def forward(*call):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            meet.wait(20)
        return body(*call)

    jobs = [job(sampler, "plain", seed, rng, 12) for seed in range(2 * lanes)]
    expected = [alone(model, asked) for asked in jobs]
    model.backbone.forward = forward
    rows = []
    engine = Engine(model, rows=4 * lanes, lanes=lanes, on_forward=lambda n, _: rows.append(n))
    ends = SimpleQueue()
    try:
        with engine._change:  # all come at once
            for index, asked in enumerate(jobs):
                engine.submit(Ticket(asked, lambda event, i=index: ends.put((i, event)), 60))
        found = dict(ends.get(timeout=60) for _ in range(2 * len(jobs)))  # begun, then done
    finally:
        engine.close()
        del model.backbone.forward
    load = engine.load()
    assert len(seen) == lanes and max(rows) == 2 and not meet.broken
    assert [(found[i].tokens.tolist(), found[i].num_forwards) for i in range(len(jobs))] == expected
    assert (load.num_forwards, load.rows) == (len(rows), sum(rows))
    assert not engine.alive


def test_as_many_lanes_as_cores_but_none_of_few_rows(model, monkeypatch):
    def lanes(cores, rows, **options):
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        engine = Engine(model, rows=rows, **options)
        engine.close()
        return [lane.most for lane in engine._lanes]

    assert lanes(1, 16) == [16]
    assert lanes(2, 16) == [8, 8]
    assert lanes(8, 16) == [4] * 4
    assert lanes(2, 7) == [7]
    assert lanes(2, 9) == [4, 5]
    assert lanes(2, 3, lanes=9) == [1, 1, 1]
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    assert lanes(8, 16) == [16]


def test_a_lane_has_the_cores_that_no_other_uses(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    used: dict[int, list[int]] = {}

    def note(count):
        if threading.current_thread().name == "lane":
            used.setdefault(threading.get_ident(), []).append(count)

    monkeypatch.setattr(torch, "set_num_threads", note)
    slow = Held(model.backbone.vocab)
    engine, ends, other = Engine(model, rows=8, lanes=2), SimpleQueue(), SimpleQueue()
    rng = random.Random(4)
    try:
        engine.submit(Ticket(job(slow, "slow", 1, rng, 12), ends.put, 60))
        while engine.load().num_forwards < 2:
            pass
        (first,) = used
        assert first == engine._lanes[0].thread.ident
        assert set(used[first]) == {4}
        plain = made(model, "plain")
        engine.submit(Ticket(job(plain, "plain", 2, rng, 12), other.put, 60))
        while not isinstance(other.get(timeout=60), Done):
            pass
        (second,) = set(used) - {first}
        assert set(used[second]) == {2}  # the first waits at its gate, and counts
        slow.gate.set()
        while not isinstance(ends.get(timeout=60), Done):
            pass
    finally:
        engine.close()
    assert used[first][-1] == 3  # the other lane has a team now, whose second thread counts
    for lane in engine._lanes:
        lane.idle = True
    assert [engine._threads(number) for number in range(2)] == [3, 2], "the second's team grows"


def test_one_request_at_a_time_is_always_the_first_lanes(model, monkeypatch):
    """Threads that compute on several cores slow each other down, even while they wait."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    used: dict[str, set[int]] = {}

    def note(count):
        used.setdefault(threading.current_thread().name.split("_")[0], set()).add(count)

    monkeypatch.setattr(torch, "set_num_threads", note)
    engine, rng, plain = Engine(model, rows=8), random.Random(5), made(model, "plain")
    assert [lane.most for lane in engine._lanes] == [4, 4]
    begun = set[Lane]()
    opened = Lane._open

    def note_lane(lane, fresh):
        begun.add(lane)
        opened(lane, fresh)

    monkeypatch.setattr(Lane, "_open", note_lane)
    try:
        for seed in range(12):
            ends = SimpleQueue()
            engine.submit(Ticket(job(plain, "plain", seed, rng, 6), ends.put, 60))
            while not isinstance(ends.get(timeout=60), Done):
                pass
            while engine.load().running or not engine._lanes[0].idle:
                time.sleep(0.001)
    finally:
        engine.close()
    assert begun == {engine._lanes[0]}
    assert used["lane"] == {2} and used["cohort"] == {1}


def test_requests_do_not_wait_while_both_lanes_have_room(model):
    class Running:
        rows, tickets = 1, ()

    engine = Engine(model, rows=16, lanes=2)
    engine.close()  # its threads are gone: what they would take is asked below
    sampler, rng = made(model, "plain"), random.Random(9)
    for lane in engine._lanes:
        lane.cohorts.append(Running())
    waiting = [Ticket(job(sampler, "plain", i, rng, 6), print, 60) for i in range(5)]
    engine._queue.extend(waiting[:2])
    assert [engine._admitted(lane) for lane in engine._lanes] == [waiting[:1], waiting[1:2]]
    for lane in engine._lanes:
        lane.cohorts[0].rows = 7  # room for one each: not worth a canvas while two wait
    engine._queue.extend(waiting[2:])
    assert [engine._admitted(lane) for lane in engine._lanes] == [[], []]


def test_requests_that_one_canvas_can_hold_begin_together(model):
    engine = Engine(model, rows=8, lanes=1)
    engine.close()
    (lane,), rng = engine._lanes, random.Random(2)
    shapes = [("plain", 6), ("plain", 9), ("drawn", 6), ("plain", 6), ("plain", 9), ("plain", 6)]
    queue = [
        Ticket(job(made(model, name), name, i, rng, tokens), print, 60)
        for i, (name, tokens) in enumerate(shapes)
    ]
    lane.most = 4
    engine._queue.extend(queue)
    assert engine._admitted(lane) == [queue[i] for i in (0, 3, 5, 1)]
    assert list(engine._queue) == [queue[2], queue[4]], "who waits longest is not first any more"
    assert engine._admitted(lane) == [queue[2], queue[4]] and not engine._queue


@pytest.mark.parametrize("before", [False, True])
def test_a_lane_that_dies_ends_its_requests(model, monkeypatch, caplog, before):
    """Whether its canvases have their forward by then, or wait for it."""
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    calls = []

    def fail(*_):
        calls.append(1)
        raise ValueError("a fault of whoever listens")

    if before:
        monkeypatch.setattr(Lane, "_hidden", fail)
    engine, ends = Engine(model, rows=4, on_forward=fail), SimpleQueue()
    try:
        asked = job(made(model, "plain"), "plain", 3, random.Random(3), 6)
        engine.submit(Ticket(asked, ends.put, 60))
        assert ends.get(timeout=20) == Begun()
        end = ends.get(timeout=20)
        assert isinstance(end, Failed) and "whoever listens" in str(end.error)
        engine._lanes[0].thread.join(20)
        assert not engine.alive and len(calls) == 1
        with pytest.raises(RequestError):
            engine.submit(Ticket(asked, ends.put, 60))
    finally:
        engine.close()
    for thread in engine._hands._threads:
        thread.join(20)
        assert not thread.is_alive(), "a canvas waits for ever, and the process with it"
    assert logged(caplog, "a lane ends") == [True]


def test_another_lane_answers_where_the_first_has_died(model, monkeypatch):
    engine, rng = Engine(model, rows=8, lanes=2), random.Random(3)
    engine.close()  # its threads are gone: their turns are taken below
    engine._closed = False
    first, second = engine._lanes
    first.idle = True
    main, purge = threading.current_thread(), engine._purge

    def fail():
        if threading.current_thread() is main:
            raise ValueError("a fault while nothing was begun")
        purge()

    monkeypatch.setattr(engine, "_purge", fail)
    ticket = Ticket(job(made(model, "plain"), "plain", 3, rng, 6), print, 60)
    engine._queue.append(ticket)
    taken = SimpleQueue()
    other = threading.Thread(target=lambda: taken.put(engine._take(second)), daemon=True)
    other.start()
    while not engine._change._waiters:  # it leaves what comes to the first
        time.sleep(0.001)
    with pytest.raises(ValueError, match="nothing was begun"):
        engine._take(first)
    assert taken.get(timeout=20) == [ticket]
    other.join()


def test_a_lane_computes_the_heads_of_its_canvases(model):
    """It has the cores for what is large in a large model."""
    seen = []
    hook = model.backbone.head.register_forward_hook(
        lambda *_: seen.append(threading.current_thread().name)
    )
    engine = Engine(model, rows=4)
    try:
        answered(engine, [job(made(model, "plain"), "plain", 3, random.Random(3), 6)])
    finally:
        engine.close()
        hook.remove()
    assert set(seen) == {"lane"}


class Fake:
    """As much of a call as decides what it shares a pass with."""

    def __init__(self, wide: int, slots: int | None = None, rows: int = 1) -> None:
        self.embeds, self.context = torch.zeros(rows, wide, 2), self
        self.query_slots, self.branch, self.attn_mask, self.output_slots = slots, None, None, 1


def test_passes_of_whole_canvases_and_of_parts_are_kept_apart():
    calls = [Fake(40), Fake(4, 1), Fake(41), Fake(6, 1), Fake(9, 1), Fake(10)]
    assert groups(calls) == [[2, 0, 5], [4, 3, 1]]
    assert groups([]) == []


def test_calls_are_padded_only_while_that_is_cheaper_than_another_pass():
    assert groups([Fake(100), Fake(195)]) == [[1, 0]]  # 95 slots of padding
    assert groups([Fake(100), Fake(197)]) == [[1], [0]]  # 97
    assert groups([Fake(100, rows=3), Fake(140)]) == [[1], [0]]  # 120 for the three together


def test_whole_canvases_share_one_pass_where_padding_costs_nothing():
    calls = [Fake(10), Fake(400), Fake(4, 1), Fake(90)]
    with torch.no_grad():
        assert groups(calls, ragged=True) == [[0, 1, 3], [2]]
        calls[1].attn_mask = torch.ones(1)  # its mask cannot be packed
        assert groups(calls, ragged=True) == [[0, 3], [1], [2]]
    assert groups(calls, ragged=True) == groups(calls)  # gradients are wanted: nothing is packed


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 4)), min_size=1, max_size=7))
def test_no_division_of_the_calls_by_length_is_cheaper(sizes):
    calls = [Fake(wide, rows=rows) for wide, rows in sizes]

    def cost(division):
        return sum(
            _PASS + max(sizes[i][0] for i in group) * sum(sizes[i][1] for i in group)
            for group in division
        )

    found = groups(calls)
    assert sorted(i for group in found for i in group) == list(range(len(sizes)))
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i][0])
    cuts = range(1, len(order))
    for count in range(len(order)):
        for ends in itertools.combinations(cuts, count):
            parts = [order[a:b] for a, b in itertools.pairwise((0, *ends, len(order)))]
            assert cost(found) <= cost(parts)


class Held(Blockwise):
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
    slow, quick = Held(model.backbone.vocab), made(model, "plain")
    first, second = job(slow, "slow", 1, rng, 12), job(quick, "plain", 2, rng, 6)
    engine, events = Engine(model, rows=4), SimpleQueue()
    try:
        engine.submit(Ticket(first, lambda event: events.put(("first", event)), 60))
        while engine.load().num_forwards < 2:
            pass
        engine.submit(Ticket(second, lambda event: events.put(("second", event)), 60))
        slow.gate.set()
        order = []
        while len(order) < 2:
            name, event = events.get(timeout=60)
            if isinstance(event, Done):
                order.append(name)
                expected = alone(model, {"first": first, "second": second}[name])
                assert (event.tokens.tolist(), event.num_forwards) == expected
        assert order == ["second", "first"], "the short one did not leave first"
    finally:
        engine.close()


def test_a_watched_request_hears_every_step_and_then_the_answer(model):
    asked = job(made(model, "plain"), "plain", 3, random.Random(3), 6)._replace(watched=True)
    engine, events = Engine(model, rows=4), SimpleQueue()
    try:
        engine.submit(Ticket(asked, events.put, 60))
        heard = [events.get(timeout=60)]
        while not isinstance(heard[-1], Done):
            heard.append(events.get(timeout=60))
    finally:
        engine.close()
    assert isinstance(heard[0], Begun)
    moments = [event for event in heard if isinstance(event, Moment)]
    assert [moment.num_forwards for moment in moments] == list(range(1, heard[-1].num_forwards + 1))
    assert moments[-1].tokens.tolist() == heard[-1].tokens.tolist()


def test_a_row_that_nobody_waits_for_takes_part_in_no_more_forwards(model):
    stays, leaves = (job(made(model, "plain"), "plain", i, random.Random(i), 12) for i in (1, 2))
    rows, ends = [], SimpleQueue()
    left = Ticket(leaves._replace(watched=True), lambda _: rows and left.cancel(), 60)
    engine = Engine(model, rows=4, on_forward=lambda count, _: rows.append(count))
    try:
        with engine._change:  # both come at once, and share a canvas
            engine.submit(left)
            engine.submit(Ticket(stays, ends.put, 60))
        assert ends.get(timeout=60) == Begun()
        end = ends.get(timeout=60)
    finally:
        engine.close()
    assert (end.tokens.tolist(), end.num_forwards) == alone(model, stays)
    assert rows[0] == 2 and rows[5:] == [1] * (end.num_forwards - 5)


def test_a_recording_is_heard_once_while_it_is_remembered(model):
    rng, sampler = random.Random(4), made(model, "plain")
    jobs = [job(sampler, "plain", seed, rng, 6) for seed in range(3)]
    wave = torch.randn(5 * 32)
    jobs = [asked._replace(wave=wave) for asked in jobs]
    heard, listen = [], model.listen
    model.listen = lambda audio, lengths: heard.append(len(audio)) or listen(audio, lengths)
    try:
        for room, expected in {100: 1, 4: 2, 0: 2}.items():
            heard.clear()
            engine = Engine(model, rows=4, remember=room)
            ends = answered(engine, jobs[:1]) + answered(engine, jobs[1:])
            engine.close()
            for asked, end in zip(jobs, ends, strict=True):
                assert end.tokens.tolist() == alone(model, asked)[0]
            assert sum(heard) >= expected
            assert room < 5 or sum(heard) == 1
    finally:
        del model.listen


def test_the_recording_used_longest_ago_is_forgotten_first():
    heard = []

    class Listener:
        def listen(self, audio, lengths):
            heard.extend(lengths.tolist())
            return Embeds(torch.ones(len(audio), int(lengths.max()), 2), lengths)

    ears = Ears(Listener(), room=9)
    for length in (4, 3, 4, 5, 4, 3):  # the fourth is one too many
        ears([torch.ones(length)])
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


def test_a_fault_of_one_request_is_not_the_others_(model, caplog):
    rng = random.Random(5)
    faulty, good = Faulty(model.backbone.vocab, block_length=4), made(model, "plain")
    jobs = [job(good, "plain", seed, rng) for seed in range(4)]
    engine = Engine(model, rows=8)
    try:
        ends = answered(engine, [job(faulty, "faulty", 9, rng), *jobs])
    finally:
        engine.close()
    assert isinstance(ends[0], Failed) and "a fault" in str(ends[0].error)
    assert logged(caplog, "1 requests fail at step 1: RuntimeError") == [True]
    assert "a fault of this sampler" in caplog.text
    for asked, end in zip(jobs, ends[1:], strict=True):
        assert end.tokens.tolist() == alone(model, asked)[0]


def test_a_shared_forward_that_fails_is_tried_one_by_one(model, caplog):
    rng, sampler = random.Random(6), made(model, "plain")
    jobs = [job(sampler, str(seed), seed, rng, 6) for seed in range(3)]  # a canvas each
    body = model.backbone.forward

    def narrow(embeds, positions, context):
        if len(embeds) > 1:
            raise torch.OutOfMemoryError("too many rows")
        return body(embeds, positions, context)

    model.backbone.forward = narrow
    engine = Engine(model, rows=4)
    try:
        ends = answered(engine, jobs)
    finally:
        engine.close()
        del model.backbone.forward
    for asked, end in zip(jobs, ends, strict=True):
        assert end.tokens.tolist() == alone(model, asked)[0]
    told = logged(caplog, "canvases fails, each is tried alone: OutOfMemoryError")
    assert told and all(told) and len(told) == len(caplog.records)


@pytest.mark.parametrize(
    ("error", "traceback"), [(AudioError("it is silent"), False), (RuntimeError("no ears"), True)]
)
def test_a_recording_that_is_not_heard_is_answered_and_logged(model, caplog, error, traceback):
    def deaf(audio, lengths):
        raise error

    asked = job(made(model, "plain"), "plain", 0, random.Random(1), 6)
    model.listen = deaf
    engine = Engine(model, rows=4)
    try:
        (end,) = answered(engine, [asked._replace(wave=torch.randn(160))])
    finally:
        engine.close()
        del model.listen
    assert end == Failed(error)
    assert logged(caplog, "a recording of 160 samples is not heard") == [traceback]
    assert str(error) in caplog.text


def test_a_request_that_does_not_fit_is_answered_and_logged(model, caplog):
    asked = job(made(model, "plain"), "plain", 0, random.Random(1), 6)
    model.backbone.max_length = 7
    engine = Engine(model, rows=4)
    try:
        (end,) = answered(engine, [asked._replace(prompt=torch.arange(9), wave=None)])
    finally:
        engine.close()
        del model.backbone.max_length
    assert isinstance(end.error, SpecError)
    assert logged(caplog, f"a request does not begin: {end.error}") == [False]


def test_a_closed_engine_ends_what_is_left_and_takes_nothing_new(model):
    slow, ends = Held(model.backbone.vocab), SimpleQueue()
    engine = Engine(model, rows=1)
    for seed in range(2):
        engine.submit(Ticket(job(slow, "slow", seed, random.Random(7), 12), ends.put, 60))
    while engine.load().num_forwards < 2:
        pass
    threading.Timer(0.2, slow.gate.set).start()
    engine.close()
    failed = [event for event in (ends.get(timeout=20) for _ in range(3)) if event != Begun()]
    assert [event.error.status for event in failed] == [503, 503]
    with pytest.raises(RequestError):
        engine.submit(Ticket(job(slow, "slow", 3, random.Random(8), 12), ends.put, 60))
    assert not engine.alive
