"""Several processes of one machine, each with a model; a process that dies is replaced."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from diffa.errors import DiffaError, SpecError
from diffa.mapping.plan import Plan
from diffa.mapping.shards import Writer, Written

TRIES = 3  # of one shard, before its processes' deaths are taken for its fault


class Worker:
    """A process and the shard that it is busy with."""

    def __init__(self, plan: Plan, out: Path, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self.shard = number, -1
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(plan, out, number, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, shard: int) -> None:
        """Hand over a shard; a process that has died is found out when its answer is awaited."""
        self.shard = shard
        with suppress(OSError):
            self.pipe.send(shard)

    def end(self) -> None:
        """Let the process go."""
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()


def work(plan: Plan, out: Path, number: int, pipe: Connection) -> None:
    """The life of a process: shards come in, what was written goes out, until the pipe ends."""
    try:
        writer = Writer(plan, out, load(plan, number))
    except Exception as error:
        pipe.send(error if isinstance(error, DiffaError) else DiffaError(repr(error)))
        return
    while True:
        try:
            shard = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(writer.write(shard))
        except DiffaError as error:
            pipe.send(error)


def load(plan: Plan, number: int) -> Any:
    """The plan's model for worker ``number``, on a GPU of its own where there are several."""
    import torch

    torch.set_num_threads(plan.threads)
    device = plan.source.device
    if device == "cuda" and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    return plan.source.load(device)


def run_here(plan: Plan, out: Path, shards: Sequence[int]) -> Iterator[Written]:
    """Write shards in this process."""
    writer = Writer(plan, out, load(plan, 0))
    for shard in shards:
        yield writer.write(shard)


def run_pool(plan: Plan, out: Path, shards: Sequence[int], workers: int) -> Iterator[Written]:
    """Write shards in ``workers`` processes, yielding each as it is done.

    Raises:
        DiffaError: a shard cannot be written, or its processes die again and again.
    """
    left, tries = deque(shards), dict.fromkeys(shards, 0)
    busy: list[Worker] = []
    try:
        for number in range(min(workers, len(shards))):
            busy.append(Worker(plan, out, number))
            busy[-1].give(left.popleft())
        while busy:
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                found = _reply(worker)
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    worker = _replaced(worker, busy, tries, plan, out)
                    continue
                yield found
                if left:
                    worker.give(left.popleft())
                else:
                    busy.remove(worker)
                    worker.end()
    finally:
        for worker in busy:
            worker.process.kill()
            worker.end()


def _reply(worker: Worker) -> Written | Exception | None:
    """What a worker says; None where it has died."""
    try:
        found: Written | Exception = worker.pipe.recv()
        return found
    except (EOFError, OSError):
        return None


def _replaced(
    dead: Worker, busy: list[Worker], tries: dict[int, int], plan: Plan, out: Path
) -> Worker:
    """A new worker with the dead one's shard."""
    tries[dead.shard] += 1
    dead.end()
    if tries[dead.shard] >= TRIES:
        code = dead.process.exitcode
        raise SpecError(
            f"shard {dead.shard} has ended {TRIES} processes (exit code {code}): too little memory "
            "perhaps; lower --batch or --workers and run the same command again"
        )
    fresh = Worker(plan, out, dead.number)
    busy[busy.index(dead)] = fresh
    fresh.give(dead.shard)
    return fresh
