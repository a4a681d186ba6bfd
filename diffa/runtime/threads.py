"""Threads that compute: one with a team of OpenMP's is fast, several are slow.

Every Python thread that runs PyTorch's operations on several cores starts a team of OpenMP threads
and keeps it as long as it lives. While all teams of a process together have no more threads than
there are cores, those that wait for each other spin; beyond that libgomp puts them to sleep, at
every one of an answer's many small operations. On two cores an answer of nano takes twice as long
once a second thread has computed anything (``benchmarks/openmp.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from diffa.errors import DiffaError

T = TypeVar("T")

_END = object()


class ComputeThread:
    """One thread, in which all that a process computes is done in turn, on as many cores as
    PyTorch would use where the hand is made."""

    def __init__(self) -> None:
        import torch

        cores = torch.get_num_threads()  # a new thread's own may be what another thread set last
        self._pool = ThreadPoolExecutor(1, "hand", torch.set_num_threads, (cores,))

    def __call__(self, work: Callable[..., T], *given: object) -> T:
        """What ``work(*given)`` returns or raises, there.

        Raises:
            DiffaError: the process is about to end.
        """
        try:
            told = self._pool.submit(work, *given)
        except RuntimeError as error:
            raise DiffaError("the process ends: nothing more is computed") from error
        return told.result()

    def each(self, made: Iterator[T]) -> Iterator[T]:
        """Yield what an iterator makes there, one at a time."""
        while (found := self(next, made, _END)) is not _END:
            yield found


@contextmanager
def single_core() -> Iterator[None]:
    """Compute on one core for a while, so that this thread starts no team, for another is to."""
    import torch

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)
