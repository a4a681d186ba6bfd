"""The command ``diffa map``: answers for a whole manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from diffa.cli.models import default_spec, model_source, resolve_device
from diffa.cli.options import (
    AudioFolderOption,
    DeviceOption,
    DtypeOption,
    GpusOption,
    MaxTokensOption,
    RayOption,
    SamplerPresetOption,
    SetOption,
    SpecOption,
    SystemOption,
)
from diffa.cli.output import print_json, print_note
from diffa.errors import SpecError

ManifestArgument = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="Manifest: a .json list or a .jsonl file.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for the Parquet shards.")]
QuestionOption = Annotated[
    str | None,
    typer.Option(
        "--question", help="Question about every recording (default: the row's own input)."
    ),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Rows per batch.")]
ShardOption = Annotated[int, typer.Option("--shard", min=1, help="Rows per shard.")]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="Number of processes on this machine.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads per process (default: all cores, divided evenly)."
    ),
]
ReplicasOption = Annotated[
    str,
    typer.Option(
        "--replicas",
        metavar="MIN:MAX",
        help="Minimum and maximum number of model replicas; needs --ray.",
    ),
]


def map_manifest(
    manifest: ManifestArgument,
    out: OutOption,
    question: QuestionOption = None,
    spec: SpecOption = "",
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = None,
    folder: AudioFolderOption = None,
    batch: BatchOption = 16,
    shard: ShardOption = 512,
    workers: WorkersOption = 1,
    threads: ThreadsOption = None,
    ray: RayOption = None,
    replicas: ReplicasOption = "1:1",
    gpus: GpusOption = 0.0,
) -> None:
    """Answer a question about every recording of a manifest.

    The same command continues an interrupted run. Exit code 1: no row could be answered.
    """
    from diffa.mapping.cluster import ReplicaLimits
    from diffa.mapping.plan import MapPlan, planned_threads
    from diffa.mapping.rows import QuestionManifest
    from diffa.mapping.run import run_map

    if ray is None and (replicas, gpus) != ("1:1", 0.0):
        raise SpecError("--replicas and --gpus need --ray: an address, auto or local")
    place = resolve_device(device)
    source = model_source(spec or default_spec(), overrides, sampler_preset, place, dtype)
    rows = QuestionManifest(manifest, question=question, folder=folder)
    plan = MapPlan(
        manifest=str(manifest.resolve()),
        folder=None if folder is None else str(folder.resolve()),
        digest=rows.digest,
        question=question,
        system=system,
        max_tokens=max_tokens or source.spec["prompt"]["max_tokens"],
        num_rows=len(rows),
        shard_size=shard,
        batch_size=batch,
        source=source,
        # A resumed run keeps its thread count: an answer's last digits depend on it.
        threads=threads or planned_threads(out) or max(1, (os.cpu_count() or 1) // workers),
    )
    summary = run_map(
        plan,
        out,
        workers=workers,
        address=ray,
        replicas=ReplicaLimits(*_parse_range(replicas), cpus=plan.threads, gpus=gpus),
        on_progress=lambda progress: print_note(str(progress)),
    )
    print_json({"out": str(out), **summary._asdict(), "rows_in_all": plan.num_rows})
    if summary.errors:
        print_note(f"{summary.errors} of {summary.rows} rows have no answer: see the column error")
    if summary.rows and summary.errors == summary.rows:
        raise typer.Exit(1)


def _parse_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError as error:
        raise SpecError(f"--replicas is MIN:MAX such as 1:4, got {text!r}") from error
    if not 1 <= bounds[0] <= bounds[1]:
        raise SpecError(f"--replicas is MIN:MAX with 1 <= MIN <= MAX, got {text!r}")
    return bounds
