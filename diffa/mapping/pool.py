"""Several processes on one machine, each with a model; a process that dies is replaced."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from diffa.errors import DiffaError, SpecError
from diffa.mapping.plan import MapPlan
from diffa.mapping.shards import ShardReport, ShardWriter

if TYPE_CHECKING:
    from diffa.model import Model

MAX_TRIES = 3  # of one shard, before the deaths of its processes are blamed on it


class WorkerProcess:
    """A process and the shard that it is writing.

    Args:
        plan: Rows, questions and options.
        out: Folder of the shards.
        number: Number of the worker; chooses its GPU.
    """

    def __init__(self, plan: MapPlan, out: Path, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self.shard = number, -1
        self.pipe, child_pipe = context.Pipe()
        arguments = (plan, out, number, child_pipe)
        self.process = context.Process(target=write_shards, args=arguments, daemon=True)
        self.process.start()
        # Only the child may hold its end: else its death would not close the pipe.
        child_pipe.close()

    def send(self, shard: int) -> None:
        """Send a shard to the process."""
        self.shard = shard
        with suppress(OSError):  # a dead process is noticed when its report is awaited
            self.pipe.send(shard)

    def receive(self) -> ShardReport | Exception | None:
        """Return the report or the error of the process; None if it has died."""
        try:
            reply: ShardReport | Exception = self.pipe.recv()
        except (EOFError, OSError):
            return None
        return reply

    def close(self) -> None:
        """Let the process end."""
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()


def write_shards(plan: MapPlan, out: Path, number: int, pipe: Connection) -> None:
    """Write the shards that arrive in a pipe and send back reports, until the pipe is closed."""
    try:
        writer = ShardWriter(plan, out, load_worker_model(plan, number))
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
        except (DiffaError, OSError) as error:
            pipe.send(error)


def load_worker_model(plan: MapPlan, number: int) -> Model:
    """Load the plan's model for worker ``number``; with several GPUs, each worker has its own."""
    import torch

    torch.set_num_threads(plan.threads)
    device = plan.source.device
    if device == "cuda" and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    return plan.source.load(device)


def map_in_process(plan: MapPlan, out: Path, shards: Sequence[int]) -> Iterator[ShardReport]:
    """Write shards in this process, and yield a report of each."""
    writer = ShardWriter(plan, out, load_worker_model(plan, 0))
    for shard in shards:
        yield writer.write(shard)


def map_in_pool(
    plan: MapPlan, out: Path, shards: Sequence[int], num_workers: int
) -> Iterator[ShardReport]:
    """Write shards in several processes, and yield a report of each.

    Raises:
        DiffaError: A shard cannot be written, or it ends ``MAX_TRIES`` processes.
    """
    queue, tries = deque(shards), dict.fromkeys(shards, 0)
    workers: list[WorkerProcess] = []
    try:
        for number in range(min(num_workers, len(shards))):
            workers.append(WorkerProcess(plan, out, number))
            workers[-1].send(queue.popleft())
        while workers:
            # A pipe becomes ready with a report, and also when its process dies.
            ready = wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                reply = worker.receive()
                if isinstance(reply, Exception):
                    raise reply
                if reply is None:
                    workers[workers.index(worker)] = _restart(worker, tries, plan, out)
                    continue
                yield reply
                if queue:
                    worker.send(queue.popleft())
                else:
                    workers.remove(worker)
                    worker.close()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.close()


def _restart(dead: WorkerProcess, tries: dict[int, int], plan: MapPlan, out: Path) -> WorkerProcess:
    """Return a new worker that writes the dead one's shard."""
    tries[dead.shard] += 1
    dead.close()
    if tries[dead.shard] >= MAX_TRIES:
        raise SpecError(
            f"shard {dead.shard} has ended {MAX_TRIES} processes (exit code "
            f"{dead.process.exitcode}): too little memory perhaps; lower --batch or --workers and "
            "run the same command again"
        )
    worker = WorkerProcess(plan, out, dead.number)
    worker.send(dead.shard)
    return worker
