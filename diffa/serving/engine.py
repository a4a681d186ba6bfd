"""Continuous batching: requests join and leave between forwards, which all of them share."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.inputs import check_context
from diffa.serving.cohort import Cohort
from diffa.serving.faults import busy, closing, late, record
from diffa.serving.hearing import Ears
from diffa.serving.sharing import Call, together
from diffa.serving.tickets import Begun, Failed, Ticket

_log = logging.getLogger(__name__)


class Load(NamedTuple):
    """How busy an engine is: requests waiting and running, forwards so far and rows in them."""

    waiting: int
    running: int
    forwards: int
    rows: int


class Engine:
    """Answers requests of one model in shared forwards, in a thread of its own.

    Each request keeps its own canvas, memory and draws; ``sharing.together`` lets the backbone see
    them side by side. Requests join as soon as there is room, and leave when their answer is final.

    Args:
        model: what answers.
        rows: requests in a forward at most.
        waiting: requests that may wait; ``submit`` refuses more.
        remember: embeddings of recent recordings that are kept, in case they are asked about again.
        on_forward: told the rows of every shared forward and its seconds.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 16,
        waiting: int = 64,
        remember: int = 0,
        on_forward: Callable[[int, float], None] | None = None,
    ) -> None:
        self.model, self.most, self.room = model, rows, waiting
        self._on_forward, self._ears = on_forward, Ears(model, remember)
        self._queue: deque[Ticket] = deque()
        self._cohorts: list[Cohort] = []
        self._arrivals: SimpleQueue[tuple[Cohort, Call | None]] = SimpleQueue()
        self._pace = 1.0  # seconds per answer of late, for Retry-After
        self._last = time.monotonic()
        self._forwards = self._rows = 0
        self._change = threading.Condition()  # its lock may be taken twice
        self._closed = False
        self._threads = ThreadPoolExecutor(rows, thread_name_prefix="cohort")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request.

        Raises:
            Refusal: the queue is full (429), or the engine is closing (503).
        """
        with self._change:
            if self._closed:
                raise closing()
            self.check_room()
            self._queue.append(ticket)
            self._change.notify()

    def check_room(self) -> None:
        """Raise Refusal (429) while the queue is full."""
        with self._change:
            self._purge()
            if len(self._queue) >= self.room:
                wait = 1 + int(self._pace * len(self._queue))
                raise busy(f"{len(self._queue)} requests are waiting: try again later", wait)

    def load(self) -> Load:
        """How busy the engine is."""
        with self._change:
            running = sum(cohort.rows for cohort in self._cohorts)
            return Load(len(self._queue), running, self._forwards, self._rows)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def close(self, wait: float = 0.0) -> None:
        """Refuse new requests, wait up to so many seconds for the others, then drop them."""
        until = time.monotonic() + wait
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._change:
            left = [*self._queue, *(t for cohort in self._cohorts for t in cohort.tickets)]
        for ticket in left:
            ticket.end(Failed(closing()))
        self._thread.join(10)
        self._threads.shutdown(wait=False)

    def _loop(self) -> None:
        with torch.no_grad():
            while True:
                with self._change:
                    while not (self._queue or self._cohorts or self._closed):
                        self._change.wait()
                    self._purge()
                    if self._closed and not (self._queue or self._cohorts):
                        return
                    fresh = self._admitted()
                self._open(fresh)
                if self._cohorts:
                    self._forward()

    def _purge(self) -> None:
        """Forget requests in the queue that nobody waits for, or that are too late."""
        now = time.monotonic()
        for ticket in self._queue:
            if now > ticket.until:
                ticket.end(Failed(late(ticket.deadline)))
        if not all(ticket.open for ticket in self._queue):
            self._queue = deque(ticket for ticket in self._queue if ticket.open)

    def _admitted(self) -> list[Ticket]:
        """Take requests off the queue: a few at once rather than each by itself, because a canvas
        of several rows costs its sampler hardly more than one of a single row."""
        running = sum(cohort.rows for cohort in self._cohorts)
        room = self.most - max(running, len(self._cohorts))
        if running and room < min(len(self._queue), max(1, self.most // 4)):
            return []
        return [self._queue.popleft() for _ in range(min(room, len(self._queue)))]

    def _open(self, fresh: Sequence[Ticket]) -> None:
        """Listen to the newcomers' recordings and start their canvases."""
        if not self._cohorts:
            self._last = time.monotonic()
        kinds: dict[Any, list[tuple[Ticket, Tensor | None]]] = {}
        for ticket, heard in self._heard(fresh):
            ticket.tell(Begun())
            job = ticket.job
            kinds.setdefault((job.kind, job.max_tokens), []).append((ticket, heard))
        for pairs in kinds.values():
            tickets, heard_ = zip(*pairs, strict=True)
            cohort = Cohort(self.model.backbone, tickets, heard_, self._arrive)
            with self._change:
                self._cohorts.append(cohort)
            self._threads.submit(cohort.run)

    def _heard(self, fresh: Sequence[Ticket]) -> list[tuple[Ticket, Tensor | None]]:
        """Each newcomer with its audio's embeddings (N, W); those that cannot be heard are told."""
        made: list[tuple[Ticket, Tensor | None]] = []
        made += [(ticket, None) for ticket in fresh if ticket.job.wave is None]
        spoken = [(ticket, ticket.job.wave) for ticket in fresh if ticket.job.wave is not None]
        heard = self._ears([wave for _, wave in spoken])
        for (ticket, wave), embeds in zip(spoken, heard, strict=True):
            if isinstance(embeds, Exception):
                record(_log, f"a recording of {len(wave)} samples is not heard", embeds)
                ticket.end(Failed(embeds))
            else:
                made.append((ticket, embeds))
        return [pair for pair in made if self._fits(*pair)]

    def _fits(self, ticket: Ticket, heard: Tensor | None) -> bool:
        """Whether a request fits the backbone's context; it is told where not."""
        job, model = ticket.job, self.model
        ticket.heard = 0 if heard is None else len(heard)
        seconds = 0.0 if job.wave is None else len(job.wave) / model.encoder.sample_rate
        most = getattr(model.backbone, "context", None)
        try:
            check_context(len(job.prompt), ticket.heard, job.max_tokens, seconds, most)
        except Exception as error:
            record(_log, "a request does not begin", error)
            ticket.end(Failed(error))
        return ticket.open

    def _arrive(self, cohort: Cohort, call: Call | None) -> None:
        self._arrivals.put((cohort, call))

    def _forward(self) -> None:
        """Wait until every cohort waits for its forward or is over, and run what they wait for."""
        begun = time.monotonic()
        waiting: list[tuple[Cohort, Call]] = []
        for _ in range(len(self._cohorts)):
            cohort, call = self._arrivals.get()
            if call is None:
                self._retire(cohort)
            else:
                waiting.append((cohort, call))
        if not waiting:
            return
        calls = [call for _, call in waiting]
        rows = sum(len(call.embeds) for call in calls)
        self._forwards, self._rows = self._forwards + 1, self._rows + rows
        for (cohort, _), hidden in zip(waiting, self._hidden(calls), strict=True):
            cohort.reply(hidden)
        now = time.monotonic()
        if self._on_forward is not None:
            self._on_forward(rows, now - begun)
        for cohort, _ in waiting:
            for ticket in cohort.tickets:
                if ticket.open and now > ticket.until:
                    ticket.end(Failed(late(ticket.deadline)))

    def _hidden(self, calls: Sequence[Call]) -> Sequence[Tensor | Exception]:
        """Hidden states of every call. Where the shared pass fails, each is tried by itself, so
        that one request's fault is not everybody's."""
        try:
            return together(self.model.backbone, calls)
        except Exception as shared:
            record(_log, f"a forward of {len(calls)} canvases fails, each is tried alone", shared)
            found: list[Tensor | Exception] = []
            for call in calls:
                try:
                    found.append(self.model.backbone(*call))
                except Exception as error:  # the cohort that gets it tells its requests and the log
                    found.append(error)
            return found

    def _retire(self, cohort: Cohort) -> None:
        with self._change:
            self._cohorts.remove(cohort)
        now = time.monotonic()
        each = (now - self._last) / len(cohort.tickets)
        self._pace, self._last = 0.9 * self._pace + 0.1 * each, now
