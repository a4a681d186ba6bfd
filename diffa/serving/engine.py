"""Continuous batching: requests join and leave between forwards, which all of them share."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from diffa.serving.encoder_cache import Ears
from diffa.serving.errors import deadline_exceeded, queue_full, shutting_down
from diffa.serving.requests import Failed, Ticket
from diffa.serving.worker import Lane

# Rows that are worth a lane of their own: for nano on two cores, two forwards of 8 rows beside
# each other take three quarters of the time of one forward of 16 rows on both.
_LANE = 4


class Load(NamedTuple):
    """How busy an engine is: requests waiting and running, forwards so far and rows in them."""

    waiting: int
    running: int
    num_forwards: int
    rows: int


class Engine:
    """Answers requests of one model in shared forwards.

    Each request keeps its own canvas, memory and draws; ``sharing.together`` lets the backbone see
    them side by side. Requests join as soon as there is room, and leave when their answer is final.
    On a CPU of several cores they are spread over lanes, whose forwards run beside each other:
    small matrices keep one core busy, but not many. Where the others have nothing to do, the first
    takes what comes, and uses the cores that their teams leave it: in sum no more threads compute
    than there are cores (``diffa.runtime.threads``).

    Args:
        model: what answers.
        rows: requests that are answered at a time, in all lanes together.
        waiting: requests that may wait; ``submit`` refuses more.
        remember: embeddings of recent recordings that are kept, in case they are asked about again.
        lanes: threads that run forwards; by default one on an accelerator, and on a CPU as many as
            PyTorch has threads, with ``_LANE`` rows each at least.
        on_forward: told the rows of every shared forward and its seconds, from any lane's thread.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 16,
        waiting: int = 64,
        remember: int = 0,
        lanes: int | None = None,
        on_forward: Callable[[int, float], None] | None = None,
    ) -> None:
        self.room = waiting
        self._on_forward = on_forward
        self._queue: deque[Ticket] = deque()
        self._pace = 1.0  # seconds per answer of late, for Retry-After
        self._last = time.monotonic()
        self._forwards = self._rows = 0
        self._change = threading.Condition()  # its lock may be taken twice
        self._closed = False
        self._cores = torch.get_num_threads()
        if lanes is None:
            lanes = min(self._cores, rows // _LANE) if model.device.type == "cpu" else 1
        lanes = max(1, min(lanes, rows))
        self._each = max(1, self._cores // lanes)
        self._hands = ThreadPoolExecutor(
            rows, "cohort", initializer=torch.set_num_threads, initargs=(1,)
        )  # what is large is computed by the lane; a team for each canvas would slow it
        ears = Ears(model, remember)
        self._lanes = [
            Lane(
                model,
                ears,
                (rows + lane) // lanes,
                self._hands,
                take=self._take,
                threads=partial(self._threads, lane),
                on_forward=self._note,
                on_end=self._ended,
            )
            for lane in range(lanes)
        ]
        for lane in self._lanes:
            lane.thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request.

        Raises:
            Refusal: the queue is full (429), or the engine is closing (503).
        """
        with self._change:
            if self._closed or not any(lane.thread.is_alive() for lane in self._lanes):
                raise shutting_down()
            self.check_room()
            self._queue.append(ticket)
            self._change.notify_all()  # one would do, but it may be one that leaves it to another

    def check_room(self) -> None:
        """Raise Refusal (429) while the queue is full."""
        with self._change:
            self._purge()
            if len(self._queue) >= self.room:
                wait = 1 + int(self._pace * len(self._queue))
                raise queue_full(f"{len(self._queue)} requests are waiting: try again later", wait)

    def load(self) -> Load:
        """How busy the engine is."""
        with self._change:
            running = sum(lane.rows for lane in self._lanes)
            return Load(len(self._queue), running, self._forwards, self._rows)

    @property
    def alive(self) -> bool:
        """Whether the lanes' threads run."""
        return all(lane.thread.is_alive() for lane in self._lanes)

    def close(self, wait: float = 0.0) -> None:
        """Refuse new requests, wait up to so many seconds for the others, then drop them."""
        until = time.monotonic() + wait
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._join(until)
        cohorts = [cohort for lane in self._lanes for cohort in tuple(lane.cohorts)]
        with self._change:
            left = [*self._queue, *(t for cohort in cohorts for t in cohort.tickets)]
        for ticket in left:
            ticket.end(Failed(shutting_down()))
        self._join(time.monotonic() + 10)
        self._hands.shutdown(wait=False)

    def _join(self, until: float) -> None:
        for lane in self._lanes:
            lane.thread.join(max(0.0, until - time.monotonic()))

    def _take(self, lane: Lane) -> Sequence[Ticket] | None:
        """Wait until a lane has something to do; what it is to begin with."""
        with self._change:
            try:
                return self._next(lane)
            except BaseException:  # it ends: what comes from now on is the others'
                lane.idle = False
                self._change.notify_all()
                raise

    def _next(self, lane: Lane) -> Sequence[Ticket] | None:
        lane.idle = not lane.cohorts
        while not ((self._queue and self._may_begin(lane)) or lane.cohorts or self._closed):
            self._change.wait()
        self._purge()
        if self._closed and not (self._queue or lane.cohorts):
            return None
        fresh = self._admitted(lane)
        lane.idle = not (fresh or lane.cohorts)
        lane.worked = lane.worked or not lane.idle
        if self._queue:
            self._change.notify_all()  # the other lanes may begin
        return fresh

    def _may_begin(self, lane: Lane) -> bool:
        """Whether a lane that has nothing to do takes requests: the first always comes first."""
        return lane is self._lanes[0] or not self._lanes[0].idle

    def _purge(self) -> None:
        """Forget requests in the queue that nobody waits for, or that are too late."""
        now = time.monotonic()
        for ticket in self._queue:
            if now > ticket.until:
                ticket.end(Failed(deadline_exceeded(ticket.deadline)))
        if not all(ticket.open for ticket in self._queue):
            self._queue = deque(ticket for ticket in self._queue if ticket.open)

    def _admitted(self, lane: Lane) -> list[Ticket]:
        """Take a lane's share off the queue: a few at once rather than each by itself, and such as
        one canvas can hold, which costs its sampler hardly more than a canvas of a single row. Who
        waits longest always comes first, so that nobody is overtaken for ever."""
        taken = {one: max(one.rows, len(one.cohorts)) for one in self._lanes}
        if not any(taken.values()):
            self._last = time.monotonic()
        free = lane.most - taken[lane]
        if lane.rows and free < min(len(self._queue), max(1, lane.most // 4)):
            return []
        fair = -(-(len(self._queue) + sum(taken.values())) // len(self._lanes))
        room = max(0, min(free, fair - taken[lane]))
        alike: dict[Hashable, list[Ticket]] = {}
        for ticket in self._queue:
            alike.setdefault(ticket.job.shape, []).append(ticket)
        ordered = [ticket for tickets in alike.values() for ticket in tickets]
        chosen = set(map(id, ordered[:room]))
        self._queue = deque(ticket for ticket in self._queue if id(ticket) not in chosen)
        return ordered[:room]

    def _threads(self, lane: int) -> int:
        """Cores for a lane that is at work. Alone, the first has all but those that the others'
        teams count for, where they have one."""
        others = self._lanes[1:]
        if lane or not all(other.idle for other in others):
            return self._each
        return self._cores - sum(other.worked for other in others) * (self._each - 1)

    def _note(self, rows: int, seconds: float) -> None:
        with self._change:
            self._forwards, self._rows = self._forwards + 1, self._rows + rows
        if self._on_forward is not None:
            self._on_forward(rows, seconds)

    def _ended(self, requests: int) -> None:
        with self._change:
            now = time.monotonic()
            each = (now - self._last) / requests
            self._pace, self._last = 0.9 * self._pace + 0.1 * each, now
