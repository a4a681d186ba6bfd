"""Threads that compute: one with a team of OpenMP's is fast, several are slow.

Every Python thread that runs PyTorch's operations on several cores starts a team of OpenMP threads
and keeps it as long as it lives. While all teams of a process together have no more threads than
there are cores, those that wait for each other spin; beyond that libgomp puts them to sleep, at
every one of an answer's many small operations. On two cores an answer of nano takes 1.6 times as
long once a second thread has computed anything (``benchmarks/teams.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_END = object()


class Hand:
    """One thread, in which all that a process computes is done in turn."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hand")

    def __call__(self, work: Callable[..., T], *given: object) -> T:
        """What ``work(*given)`` returns or raises, there."""
        return self._pool.submit(work, *given).result()

    def each(self, made: Iterator[T]) -> Iterator[T]:
        """Yield what an iterator makes there, one at a time."""
        while (found := self(next, made, _END)) is not _END:
            yield found


def passing(work: Callable[..., T], *given: object) -> T:
    """What ``work(*given)`` returns or raises, in a thread whose team ends with it."""
    told: Future[T] = Future()

    def run() -> None:
        try:
            told.set_result(work(*given))
        except BaseException as error:
            told.set_exception(error)

    thread = threading.Thread(target=run, name="passing", daemon=True)  # Ctrl-C does not wait
    thread.start()
    found = told.result()
    thread.join()  # its team is gone when this returns
    return found
