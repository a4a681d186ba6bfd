"""Run PyTorch work on one thread to avoid OpenMP oversubscription.

Every Python thread that runs PyTorch operations on several cores starts a team of OpenMP threads
and keeps it as long as it lives. While all teams of a process together have no more threads than
there are cores, idle threads spin; beyond that libgomp puts them to sleep at every one of an
answer's many small operations. On two cores an answer of nano takes twice as long once a second
thread has computed anything (``benchmarks/openmp.py``).
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
    """The one thread in which a process computes, on as many cores as its maker uses."""

    def __init__(self) -> None:
        import torch

        # A new thread's own number may be what another thread set last: set it from here.
        cores = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (cores,))

    def __call__(self, work: Callable[..., T], *args: object) -> T:
        """Return what ``work(*args)`` returns in the thread, or raise what it raises.

        Raises:
            DiffaError: The process is about to end.
        """
        try:
            future = self._pool.submit(work, *args)
        except RuntimeError as error:
            raise DiffaError("the process ends: nothing more is computed") from error
        return future.result()

    def iterate(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items of an iterator that runs in the thread, one at a time."""
        while (item := self(next, items, _END)) is not _END:
            yield item


@contextmanager
def single_core() -> Iterator[None]:
    """Compute on one core for a while, so that this thread starts no OpenMP team."""
    import torch

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)
