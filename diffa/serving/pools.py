"""Threads for work that would block the event loop, bounded in number and in what waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch

from diffa.serving.errors import deadline_exceeded, queue_full

T = TypeVar("T")


class Deadline(NamedTuple):
    """Seconds that a request may take, from the moment (``time.monotonic``) of its arrival."""

    seconds: float
    arrived: float

    @property
    def seconds_left(self) -> float:
        """Seconds until it passes; negative afterwards."""
        return self.arrived + self.seconds - time.monotonic()


class WorkPool:
    """Threads for one kind of work, so that slow work of a kind delays no other.

    Args:
        name: of the threads, and in errors.
        num_threads: pieces of work that run at the same time.
        max_waiting: pieces that may wait for a thread; ``run`` refuses more.
    """

    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        # One PyTorch thread each: thread teams would compete for the workers' cores.
        self._threads = ThreadPoolExecutor(
            num_threads, name, initializer=torch.set_num_threads, initargs=(1,)
        )
        self._name, self._room, self._lock = name, num_threads + max_waiting, threading.Lock()

    async def run(self, work: Callable[[], T], deadline: Deadline) -> T:
        """Run work in a thread; what is late is not begun, or its result is dropped.

        Raises:
            RequestError: too much waits (429), or the deadline passes (504).
        """
        with self._lock:
            if not self._room:
                raise queue_full(f"too many requests wait for {self._name}: try again later", 5)
            self._room -= 1
        future = self._threads.submit(work)
        future.add_done_callback(self._on_done)
        try:
            async with asyncio.timeout(deadline.seconds_left) as timeout:
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise deadline_exceeded(deadline.seconds) from error

    def _on_done(self, _: Future[Any]) -> None:
        with self._lock:
            self._room += 1

    def close(self) -> None:
        """Cancel what waits; what runs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
