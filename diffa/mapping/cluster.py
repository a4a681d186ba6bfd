"""Shards written by an actor pool of Ray Data: replicas of the model on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from diffa.mapping.plan import MapPlan
from diffa.mapping.pool import load_worker_model
from diffa.mapping.shards import ShardReport, ShardWriter
from diffa.runtime.ray import connect


class ReplicaLimits(NamedTuple):
    """Minimum and maximum number of replicas, and the CPUs and GPUs of each."""

    minimum: int = 1
    maximum: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


class RayReplica:
    """An actor with a model that writes shards.

    Args:
        plan: Rows, questions and options.
        out: Folder of the shards.
    """

    def __init__(self, plan: MapPlan, out: str) -> None:
        self._plan, self._out = plan, Path(out)
        self._writer = ShardWriter(plan, self._out, load_worker_model(plan, 0))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch, except those that exist."""
        reports = []
        for shard in map(int, batch["item"]):
            # Ray repeats the work of a node that died, and it may have written the shard.
            exists = self._plan.shard_path(self._out, shard).is_file()
            reports.append(ShardReport(shard, 0, 0, 0.0) if exists else self._writer.write(shard))
        return {name: [getattr(r, name) for r in reports] for name in ShardReport._fields}


def map_on_ray(
    plan: MapPlan, out: Path, shards: Sequence[int], address: str, limits: ReplicaLimits
) -> Iterator[ShardReport]:
    """Write shards on the cluster at ``address``, and yield a report of each.

    Every node must see the manifest, the recordings and ``out`` under the same paths. Ray gives
    the shards of a node that dies to another one.

    Raises:
        SpecError: Ray is not installed, or there is no cluster at the address.
    """
    connect(address, "diffa map")
    data: Any = import_module("ray.data")
    items = data.from_items([int(shard) for shard in shards], override_num_blocks=len(shards))
    reports = items.map_batches(
        RayReplica,
        fn_constructor_args=(plan, str(out.resolve())),
        batch_size=1,
        compute=data.ActorPoolStrategy(min_size=limits.minimum, max_size=limits.maximum),
        num_cpus=limits.cpus,
        num_gpus=limits.gpus,
    )
    for row in reports.iter_rows():
        yield ShardReport(**{name: row[name] for name in ShardReport._fields})
