"""The command that answers a whole corpus: ``diffa map``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffa.cli.ask import DEVICE, DTYPE, SPEC, check_saved, device_of
from diffa.cli.output import print_json, say
from diffa.cli.spec import SAMPLER_PRESET, SET, default_spec, read_spec
from diffa.errors import SpecError

if TYPE_CHECKING:
    from diffa.mapping.plan import Source

RAY = Annotated[
    str | None, typer.Option("--ray", help="Address of a Ray cluster, 'auto', or 'local'.")
]
GPUS = Annotated[float, typer.Option("--gpus", min=0, help="With --ray: per replica.")]


def map_(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="JSON list or JSONL.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the Parquet shards.")],
    question: Annotated[
        str | None, typer.Option("--question", help="Asked of every row; else its own input.")
    ] = None,
    spec: SPEC = "",
    changes: SET = None,
    sampler_preset: SAMPLER_PRESET = "",
    device: DEVICE = "auto",
    dtype: DTYPE = None,
    system: Annotated[str | None, typer.Option("--system", help="Another system turn.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Length of an answer's canvas.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option("--audio", help="Where relative audio paths start.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows answered at once.")] = 16,
    shard: Annotated[int, typer.Option("--shard", min=1, help="Rows per shard.")] = 512,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes here.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads per process.")
    ] = None,
    ray: RAY = None,
    replicas: Annotated[
        str, typer.Option("--replicas", help="With --ray: models at once, LEAST:MOST.")
    ] = "1:1",
    gpus: GPUS = 0.0,
) -> None:
    """Answer a question about every recording of a manifest; the same command goes on with it.

    Exits with 1 where no row could be answered.
    """
    from diffa.mapping.cluster import Replicas
    from diffa.mapping.plan import Plan, begun
    from diffa.mapping.rows import Asking
    from diffa.mapping.run import run

    if ray is None and (replicas, gpus) != ("1:1", 0.0):
        raise SpecError("--replicas and --gpus need --ray: an address, auto or local")
    source = find_source(spec or default_spec(), changes, sampler_preset, device_of(device), dtype)
    asking = Asking(manifest, question=question, folder=folder)
    plan = Plan(
        manifest=str(manifest.resolve()),
        folder=None if folder is None else str(Path(folder).resolve()),
        digest=asking.digest,
        question=question,
        system=system,
        max_tokens=max_tokens or source.spec["prompt"]["max_tokens"],
        rows=len(asking),
        shard=shard,
        batch=batch,
        source=source,
        # as the run began: an answer's last digits depend on it
        threads=threads or begun(out) or max(1, (os.cpu_count() or 1) // workers),
    )
    least, most = _bounds(replicas)
    done = run(
        plan,
        out,
        workers=workers,
        address=ray,
        replicas=Replicas(least, most, cpus=plan.threads, gpus=gpus),
        on_progress=lambda progress: say(str(progress)),
    )
    print_json({"out": str(out), **done._asdict(), "rows_in_all": plan.rows})
    if done.errors:
        say(f"{done.errors} of {done.rows} rows have no answer: the column error says why")
    if done.rows and done.errors == done.rows:
        raise typer.Exit(1)


def find_source(
    name: str, changes: list[str] | None, sampler_preset: str, device: str, dtype: str | None
) -> Source:
    """A spec's model, or a saved one, as other processes can load it.

    Raises:
        SpecError: the spec is wrong, or sets more of a saved model than its sampler.
    """
    from diffa.mapping.plan import Source

    resolved = read_spec(name, changes, sampler_preset).resolve()
    if not (Path(name) / "model.safetensors").is_file():
        return Source(resolved.data, None, device, dtype)
    check_saved(read_spec(name, None).resolve().data, resolved.data)
    return Source(resolved.data, str(Path(name).resolve()), device, dtype)


def _bounds(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError as error:
        raise SpecError(f"--replicas is LEAST:MOST such as 1:4, got {text!r}") from error
    if not 1 <= found[0] <= found[1]:
        raise SpecError(f"--replicas is LEAST:MOST with 1 <= LEAST <= MOST, got {text!r}")
    return found
