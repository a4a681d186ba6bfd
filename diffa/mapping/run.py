"""From a manifest to a folder of shards: plan, go on where an earlier run stopped, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from diffa.errors import DiffaError
from diffa.mapping.cluster import Replicas, run_ray
from diffa.mapping.plan import Plan, keep
from diffa.mapping.pool import run_here, run_pool
from diffa.mapping.shards import Written
from diffa.runtime.files import write_json

SUMMARY = "summary.json"


class Progress(NamedTuple):
    """How far a run is: shards and rows in this run, rows with an error, audio and wall time."""

    shards: int
    of: int
    rows: int
    errors: int
    audio: float
    seconds: float

    def __str__(self) -> str:
        rate = self.audio / max(self.seconds, 1e-9)
        left = (self.of - self.shards) * self.seconds / max(1, self.shards)
        return (
            f"{self.shards}/{self.of} shards, {self.rows} rows ({self.errors} with an error), "
            f"{self.audio / 3600:.3f} h of audio, {rate:.1f} audio-hours per hour, "
            f"{left:.0f} s left"
        )


def run(
    plan: Plan,
    out: Path,
    *,
    workers: int = 1,
    address: str | None = None,
    replicas: Replicas | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Write every shard that is not there yet.

    Args:
        plan: what to do.
        out: folder of the shards; a begun run of the same plan goes on.
        workers: processes on this machine.
        address: of a Ray cluster to use instead.
        replicas: bounds of the cluster's actor pool.
        on_progress: told after each shard.

    Raises:
        SpecError: ``out`` holds another run, or the cluster cannot be used.
        DiffaError: a shard cannot be written.
    """
    keep(plan, out)
    _clean(out)
    shards = plan.pending(out)
    so_far, begun = Progress(0, len(shards), 0, 0, 0.0, 0.0), time.perf_counter()
    for written in _run(plan, out, shards, workers, address, replicas or Replicas()):
        so_far = Progress(
            so_far.shards + 1,
            so_far.of,
            so_far.rows + written.rows,
            so_far.errors + written.errors,
            so_far.audio + written.seconds,
            time.perf_counter() - begun,
        )
        if on_progress is not None:
            on_progress(so_far)
    if missing := plan.pending(out):
        raise DiffaError(f"{len(missing)} shards are missing: run the same command again")
    summarise(plan, out)
    return so_far


def _run(
    plan: Plan,
    out: Path,
    shards: list[int],
    workers: int,
    address: str | None,
    replicas: Replicas,
) -> Iterator[Written]:
    if not shards:
        return iter(())
    if address is not None:
        return run_ray(plan, out, shards, address, replicas)
    if workers == 1:
        return run_here(plan, out, shards)
    return run_pool(plan, out, shards, workers)


def summarise(plan: Plan, out: Path) -> None:
    """Write what all shards hold together: rows, errors, hours of audio, forwards."""
    import pyarrow.parquet as pq

    rows, errors, seconds, num_forwards = 0, 0, 0.0, 0
    for index in range(plan.shards):
        columns = ["error", "seconds", "num_forwards"]
        table = pq.read_table(plan.place(out, index), columns=columns)
        found = table.to_pydict()
        rows += table.num_rows
        errors += sum(error is not None for error in found["error"])
        seconds += sum(value or 0.0 for value in found["seconds"])
        num_forwards += sum(value or 0 for value in found["num_forwards"])
    hours = round(seconds / 3600, 6)
    total = {"rows": rows, "errors": errors, "audio_hours": hours, "num_forwards": num_forwards}
    write_json(out / SUMMARY, total, indent=2)


def _clean(out: Path) -> None:
    """Remove what processes that were killed have left half written."""
    for draft in out.glob(".part-*.parquet.*"):
        draft.unlink(missing_ok=True)
