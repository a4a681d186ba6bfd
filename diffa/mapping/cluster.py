"""Shards written by an actor pool of Ray Data: replicas of the model on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from diffa.errors import SpecError
from diffa.mapping.plan import Plan
from diffa.mapping.pool import load
from diffa.mapping.shards import Writer, Written


class Replicas(NamedTuple):
    """How many replicas there may be, and the CPUs and GPUs that each one takes."""

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


class Replica:
    """An actor: a model that writes the shards it is given."""

    def __init__(self, plan: Plan, out: str) -> None:
        self._writer = Writer(plan, Path(out), load(plan, 0))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch; one that is there already is left as it is."""
        plan, out = self._writer.plan, self._writer.out
        made = []
        for shard in map(int, batch["item"]):
            there = plan.place(out, shard).is_file()
            made.append(Written(shard, 0, 0, 0.0) if there else self._writer.write(shard))
        return {name: [one[i] for one in made] for i, name in enumerate(Written._fields)}


def run_ray(
    plan: Plan, out: Path, shards: Sequence[int], address: str, replicas: Replicas
) -> Iterator[Written]:
    """Write shards on the cluster at ``address``, yielding each as it is done.

    The manifest, the recordings and ``out`` must be seen by every node under the same paths. Ray
    gives the shards of a node that dies to another; a shard's bytes do not depend on who wrote it.

    Raises:
        SpecError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        ray: Any = import_module("ray")
        data: Any = import_module("ray.data")
    except ImportError as error:
        raise SpecError("diffa map --ray needs Ray: pip install 'diffa-audio[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SpecError(f"--ray {address}: {error}") from error
    asked = data.from_items([int(shard) for shard in shards], override_num_blocks=len(shards))
    done = asked.map_batches(
        Replica,
        fn_constructor_args=(plan, str(out.resolve())),
        batch_size=1,
        compute=data.ActorPoolStrategy(min_size=replicas.least, max_size=replicas.most),
        num_cpus=replicas.cpus,
        num_gpus=replicas.gpus,
    )
    for row in done.iter_rows():
        yield Written(*(row[name] for name in Written._fields))
