"""From a manifest to a folder of shards: plan, continue an earlier run, summarise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from diffa.data.tables import import_pyarrow
from diffa.errors import DiffaError
from diffa.mapping.cluster import ReplicaLimits, map_on_ray
from diffa.mapping.plan import MapPlan, write_plan
from diffa.mapping.pool import map_in_pool, map_in_process
from diffa.mapping.shards import ShardReport
from diffa.runtime.files import locked, remove_stale_drafts, write_json

SUMMARY_FILE = "summary.json"


class MapProgress(NamedTuple):
    """Progress of a run.

    Attributes:
        shards: Shards written in this run.
        total: Shards that were missing when it began.
        rows: Rows written in this run.
        errors: Rows with an error among them.
        audio: Seconds of audio.
        seconds: Wall time.
    """

    shards: int
    total: int
    rows: int
    errors: int
    audio: float
    seconds: float

    def __str__(self) -> str:
        rate = self.audio / max(self.seconds, 1e-9)
        left = (self.total - self.shards) * self.seconds / max(1, self.shards)
        return (
            f"{self.shards}/{self.total} shards, {self.rows} rows ({self.errors} with an error), "
            f"{self.audio / 3600:.3f} h of audio, {rate:.1f} audio-hours per hour, "
            f"{left:.0f} s left"
        )


def run_map(
    plan: MapPlan,
    out: Path,
    *,
    workers: int = 1,
    address: str | None = None,
    replicas: ReplicaLimits | None = None,
    on_progress: Callable[[MapProgress], None] | None = None,
) -> MapProgress:
    """Write every missing shard.

    Args:
        plan: Rows, questions and the model.
        out: Folder of the shards; an earlier run of the same plan is continued.
        workers: Processes on this machine.
        address: Address of a Ray cluster that replaces them.
        replicas: Limits of the cluster's actor pool.
        on_progress: Called after each shard.

    Raises:
        SpecError: ``out`` holds another run, or the cluster cannot be used.
        DiffaError: Another process writes into ``out``, or a shard cannot be written.
    """
    with locked(out, "diffa map"):
        write_plan(plan, out)
        remove_stale_drafts(out)
        shards = plan.missing_shards(out)
        progress, begin = MapProgress(0, len(shards), 0, 0, 0.0, 0.0), time.perf_counter()
        for report in _map_shards(plan, out, shards, workers, address, replicas or ReplicaLimits()):
            progress = MapProgress(
                progress.shards + 1,
                progress.total,
                progress.rows + report.rows,
                progress.errors + report.errors,
                progress.audio + report.seconds,
                time.perf_counter() - begin,
            )
            if on_progress is not None:
                on_progress(progress)
        if missing := plan.missing_shards(out):
            raise DiffaError(f"{len(missing)} shards are missing: run the same command again")
        _write_summary(plan, out)
    return progress


def _map_shards(
    plan: MapPlan,
    out: Path,
    shards: list[int],
    workers: int,
    address: str | None,
    replicas: ReplicaLimits,
) -> Iterator[ShardReport]:
    if not shards:
        return iter(())
    if address is not None:
        return map_on_ray(plan, out, shards, address, replicas)
    if workers == 1:
        return map_in_process(plan, out, shards)
    return map_in_pool(plan, out, shards, workers)


def _write_summary(plan: MapPlan, out: Path) -> None:
    """Write rows, errors, hours of audio and forward passes of all shards."""
    _, parquet = import_pyarrow()
    rows = errors = num_forwards = 0
    seconds = 0.0
    for index in range(plan.num_shards):
        columns = ["error", "seconds", "num_forwards"]
        with plan.shard_path(out, index).open("rb") as file:
            shard = parquet.read_table(file, columns=columns).to_pydict()
        rows += len(shard["error"])
        errors += sum(error is not None for error in shard["error"])
        seconds += sum(value or 0.0 for value in shard["seconds"])
        num_forwards += sum(value or 0 for value in shard["num_forwards"])
    hours = round(seconds / 3600, 6)
    summary = {"rows": rows, "errors": errors, "audio_hours": hours, "num_forwards": num_forwards}
    write_json(out / SUMMARY_FILE, summary, indent=2)
