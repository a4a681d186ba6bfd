"""The process of a distributed evaluation, and its progress on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from diffa.errors import SpecError

if TYPE_CHECKING:
    from diffa.evaluation.runner import EvalProgress


class Process(NamedTuple):
    """One process of several; ``wait`` (set under accelerate) blocks until all have called it."""

    rank: int
    world_size: int
    device: str
    wait: Callable[[], None] | None = None


def current_process(rank: int, world_size: int, device: str) -> Process:
    """Return the process that ``accelerate launch`` started, or the one given by the arguments.

    Raises:
        SpecError: accelerate is missing, or both accelerate and the arguments set the rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Process(rank, world_size, device)
    if world_size > 1:
        raise SpecError("--rank and --world-size are for processes that accelerate did not start")
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise SpecError(
            "several processes need accelerate: pip install 'diffa-audio[train]'"
        ) from error
    state = PartialState(cpu=device == "cpu")
    own_device = str(state.device) if device in ("auto", "cuda") else device
    return Process(state.process_index, state.num_processes, own_device, state.wait_for_everyone)


def progress_printer(process: Process) -> Callable[[EvalProgress], None] | None:
    """Return a function that prints progress: in place on a terminal, else every ten seconds."""
    if process.rank:
        return None
    terminal, last = sys.stderr.isatty(), [time.monotonic()]

    def show(progress: EvalProgress) -> None:
        now, finished = time.monotonic(), progress.done == progress.total
        if terminal:
            end = "\n" if finished else ""
            print(f"\r{progress}\x1b[K", end=end, file=sys.stderr, flush=True)
        elif finished or now - last[0] > 10:
            last[0] = now
            print(progress, file=sys.stderr, flush=True)

    return show
