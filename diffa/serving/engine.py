"""The engine: a bounded queue of requests, and the workers that decode them."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from diffa.serving.encoder_cache import EncoderCache
from diffa.serving.errors import (
    deadline_exceeded,
    engine_failed,
    log_error,
    queue_full,
    shutting_down,
)
from diffa.serving.requests import FailedEvent, RequestHandle
from diffa.serving.worker import Worker

if TYPE_CHECKING:
    from diffa.model import Model

# Rows that are worth a worker of their own: for nano on two cores, two forward passes of 8 rows
# side by side take three quarters of the time of one pass of 16 rows on both cores.
_MIN_ROWS_PER_WORKER = 4
_MAX_IDLE_DEATHS = 3
_log = logging.getLogger(__name__)


class EngineLoad(NamedTuple):
    """Requests waiting and running now, forward passes so far, and the sum of their rows."""

    num_waiting: int
    num_running: int
    num_forwards: int
    num_rows: int


class Engine:
    """Decode requests of one model in shared forward passes.

    Each request keeps its own canvas rows, KV cache and random draws, so its answer does not
    depend on the other requests. It joins as soon as a worker has room, and leaves when its
    answer is final.

    An accelerator gets one worker. A CPU of several cores gets several, whose passes run side by
    side: small matrices do not keep many cores busy. Requests go to the first worker while it is
    idle; alone, it uses the cores of the others as well. All workers together never compute on
    more threads than there are cores (``diffa.runtime.threads``).

    A worker that an error ends is replaced.

    Args:
        model: decodes the answers.
        max_batch_size: requests decoded at the same time, in all workers together.
        max_waiting: requests that may wait; ``submit`` refuses more.
        cached_embeddings: audio embeddings kept for further questions about a recording.
        num_workers: default: one on an accelerator; on a CPU one per core, with at least
            ``_MIN_ROWS_PER_WORKER`` rows each.
        on_forward: receives the rows of every forward pass and its seconds, in any worker's
            thread.

    Attributes:
        failed: whether a worker could not be replaced; then no request is accepted.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch_size: int = 16,
        max_waiting: int = 64,
        cached_embeddings: int = 0,
        num_workers: int | None = None,
        on_forward: Callable[[int, float], None] | None = None,
    ) -> None:
        self.max_waiting = max_waiting
        self._on_forward = on_forward
        self._queue: deque[RequestHandle] = deque()
        self._seconds_per_answer = 1.0  # moving average, for Retry-After
        self._last_end = time.monotonic()
        self._num_forwards = self._num_rows = 0
        # Guards the queue, the workers' flags and the counters. Submitters and workers wait for
        # different changes, so notify_all is used throughout. It is re-entrant: submit() calls
        # check_queue().
        self._changed = threading.Condition()
        self._closed = False
        self._cores = torch.get_num_threads()
        if num_workers is None:
            most = min(self._cores, max_batch_size // _MIN_ROWS_PER_WORKER)
            num_workers = most if model.device.type == "cpu" else 1
        num_workers = max(1, min(num_workers, max_batch_size))
        self._cores_per_worker = max(1, self._cores // num_workers)
        # One PyTorch thread each: heads and backbone run in the workers, what is left is small,
        # and a thread team per sampler would compete for the workers' cores.
        self._sampler_threads = ThreadPoolExecutor(
            max_batch_size, "sampler", initializer=torch.set_num_threads, initargs=(1,)
        )
        self.failed, self._idle_deaths = False, 0
        self.encoder_cache = EncoderCache(model, cached_embeddings)
        self._new_worker: Callable[[int], Worker] = lambda index: Worker(
            model,
            self.encoder_cache,
            (max_batch_size + index) // num_workers,
            self._sampler_threads,
            next_requests=self._next_requests,
            num_threads=partial(self._num_threads, index),
            on_forward=self._count_forward,
            on_batch_end=self._count_answers,
            on_end=self._replace_worker,
        )
        self._workers = [self._new_worker(index) for index in range(num_workers)]
        for worker in self._workers:
            worker.thread.start()

    def submit(self, handle: RequestHandle) -> None:
        """Queue a request.

        Raises:
            RequestError: the queue is full (429), or the engine is shutting down (503).
        """
        with self._changed:
            if self.failed:
                raise engine_failed()
            if self._closed:
                raise shutting_down()
            self.check_queue()
            self._queue.append(handle)
            self._changed.notify_all()  # notify() might wake a worker that leaves it to another

    def check_queue(self) -> None:
        """Raise RequestError (429) while the queue is full."""
        with self._changed:
            self._drop_ended()
            if len(self._queue) >= self.max_waiting:
                wait = 1 + int(self._seconds_per_answer * len(self._queue))
                raise queue_full(f"{len(self._queue)} requests are waiting: try again later", wait)

    def load(self) -> EngineLoad:
        """Return how busy the engine is."""
        with self._changed:
            running = sum(worker.num_active for worker in self._workers)
            return EngineLoad(len(self._queue), running, self._num_forwards, self._num_rows)

    @property
    def alive(self) -> bool:
        """Whether requests are accepted, and all workers' threads run."""
        return not (self._closed or self.failed) and all(
            worker.thread.is_alive() for worker in self._workers
        )

    def close(self, timeout: float = 0.0) -> None:
        """Refuse new requests, wait up to ``timeout`` seconds for the others, then fail them."""
        until = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._join(until)
        batches = [batch for worker in self._workers for batch in tuple(worker.batches)]
        with self._changed:
            rest = [*self._queue, *(handle for batch in batches for handle in batch.handles)]
        for handle in rest:
            handle.finish(FailedEvent(shutting_down()))
        self._join(time.monotonic() + 10)  # batches end at their next forward pass
        self._sampler_threads.shutdown(wait=False)

    def _replace_worker(self, ended: Worker, requests: Sequence[RequestHandle]) -> None:
        """Start another worker in the place of one that an error has ended.

        Its requests are the first in the queue. A worker that dies of a request takes it along,
        so the next one may live. One after the other that dies without any means that none can
        live: then the engine has failed.
        """
        with self._changed:
            self._idle_deaths = 0 if requests else self._idle_deaths + 1
            self._queue.extendleft(handle for handle in reversed(requests) if handle.active)
            index = self._workers.index(ended)
            try:
                if self._idle_deaths > _MAX_IDLE_DEATHS:
                    raise RuntimeError("workers end as soon as they begin")
                worker = self._new_worker(index)
                worker.thread.start()
                self._workers[index] = worker
            except RuntimeError as error:  # also: the system has no more threads
                log_error(_log, "no worker can be started", error)
                self.failed = True
                for handle in self._queue:
                    handle.finish(FailedEvent(engine_failed()))
                self._queue.clear()
            self._changed.notify_all()

    def _join(self, until: float) -> None:
        for worker in self._workers:
            worker.thread.join(max(0.0, until - time.monotonic()))

    def _next_requests(self, worker: Worker) -> Sequence[RequestHandle] | None:
        """Wait until a worker has something to do; return its new requests, None at shutdown."""
        with self._changed:
            try:
                return self._wait_for_work(worker)
            except BaseException:
                # The worker ends. It must not count as idle: the others would wait for it.
                worker.idle = False
                self._changed.notify_all()
                raise

    def _wait_for_work(self, worker: Worker) -> Sequence[RequestHandle] | None:
        worker.idle = not worker.batches
        while not ((self._queue and self._may_begin(worker)) or worker.batches or self._closed):
            self._changed.wait()
        self._drop_ended()
        if self._closed and not (self._queue or worker.batches):
            return None
        new = self._admit(worker)
        worker.idle = not (new or worker.batches)
        worker.was_used = worker.was_used or not worker.idle
        if self._queue:
            self._changed.notify_all()  # now another worker may begin
        return new

    def _may_begin(self, worker: Worker) -> bool:
        """Whether an idle worker takes requests: the first one, or any while that is busy."""
        return worker is self._workers[0] or not self._workers[0].idle

    def _drop_ended(self) -> None:
        """Remove requests from the queue that were cancelled or have expired."""
        now = time.monotonic()
        for handle in self._queue:
            handle.fail_if_expired(now, deadline_exceeded)
        if not all(handle.active for handle in self._queue):
            self._queue = deque(handle for handle in self._queue if handle.active)

    def _admit(self, worker: Worker) -> list[RequestHandle]:
        """Take a worker's share off the queue, the oldest request first.

        Requests that can share a canvas are taken together: a canvas of several rows costs its
        sampler hardly more than one of a single row. For the same reason a busy worker waits
        until a quarter of its rows is free, unless that is enough for the whole queue. The oldest
        request is always first, so that none is overtaken for ever.
        """
        # A batch whose requests were all cancelled still holds a thread until its next pass.
        load = {one: max(one.num_active, len(one.batches)) for one in self._workers}
        if not any(load.values()):
            self._last_end = time.monotonic()  # an idle engine is not a slow one
        if any(handle.suspect for batch in worker.batches for handle in batch.handles):
            return []
        if self._queue and self._queue[0].suspect:  # alone, so that it can end no other request
            return [] if load[worker] else [self._queue.popleft()]
        free = worker.max_batch_size - load[worker]
        quarter = max(1, worker.max_batch_size // 4)
        if worker.num_active and free < min(len(self._queue), quarter):
            return []
        fair_share = -(-(len(self._queue) + sum(load.values())) // len(self._workers))
        room = max(0, min(free, fair_share - load[worker]))
        groups: dict[Hashable, list[RequestHandle]] = defaultdict(list)
        for handle in self._queue:
            groups[handle.request.batch_key].append(handle)
        admitted = [handle for group in groups.values() for handle in group][:room]
        ids = set(map(id, admitted))
        self._queue = deque(handle for handle in self._queue if id(handle) not in ids)
        return admitted

    def _num_threads(self, index: int) -> int:
        """Return the PyTorch threads for a worker that computes now.

        The first worker alone may use all cores. But OpenMP keeps a thread team for each thread
        that ever computed, so it leaves out the extra threads of workers that were used.
        """
        others = self._workers[1:]
        if index or not all(other.idle for other in others):
            return self._cores_per_worker
        used = sum(other.was_used for other in others)
        return self._cores - used * (self._cores_per_worker - 1)

    def _count_forward(self, num_rows: int, seconds: float) -> None:
        with self._changed:
            self._num_forwards, self._num_rows = self._num_forwards + 1, self._num_rows + num_rows
        if self._on_forward is not None:
            self._on_forward(num_rows, seconds)

    def _count_answers(self, count: int) -> None:
        with self._changed:
            now = time.monotonic()
            seconds = (now - self._last_end) / count
            self._seconds_per_answer = 0.9 * self._seconds_per_answer + 0.1 * seconds
            self._last_end = now
