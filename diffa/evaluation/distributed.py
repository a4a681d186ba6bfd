"""Which process this is, of how many, on which device, and what it shows of its progress."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from diffa.errors import SpecError


class Place(NamedTuple):
    """One process among others; ``wait`` (under accelerate) returns once all have come to it."""

    rank: int
    world: int
    device: str
    wait: Callable[[], None] | None = None


def place(rank: int, world: int, device: str) -> Place:
    """The process that ``accelerate launch`` started, or the one that the caller says it is.

    Raises:
        SpecError: accelerate is missing where it is asked for, or both say who this is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Place(rank, world, device)
    if world > 1:
        raise SpecError("--rank and --world-size are for processes that accelerate did not start")
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise SpecError(
            "several processes need accelerate: pip install 'diffa-audio[train]'"
        ) from error
    cpu = device == "cpu"
    state = PartialState(cpu=cpu)
    own = str(state.device) if device in ("auto", "cuda") else device
    return Place(state.process_index, state.num_processes, own, state.wait_for_everyone)


def shown(where: Place) -> Callable[[Any], None] | None:
    """What writes progress to stderr: in place on a terminal, else a line every ten seconds."""
    if where.rank:
        return None
    terminal, last = sys.stderr.isatty(), [time.monotonic()]

    def show(progress: Any) -> None:
        now, whole = time.monotonic(), progress.done == progress.total
        if terminal:
            print(f"\r{progress}\x1b[K", end="\n" if whole else "", file=sys.stderr, flush=True)
        elif whole or now - last[0] > 10:
            last[0] = now
            print(progress, file=sys.stderr, flush=True)

    return show
