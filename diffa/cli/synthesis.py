"""The commands that write data with a language model: ``diffa data captions | rewrite | ...``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffa.cli.manifests import read_manifests
from diffa.cli.models import load_model, parse_override
from diffa.cli.options import (
    FsddOption,
    ManifestArgument,
    ManifestOutOption,
    PerMinuteOption,
    Split,
)
from diffa.cli.output import print_note, print_notes
from diffa.errors import SpecError

if TYPE_CHECKING:
    from diffa.data.samples import Fault
    from diffa.data.synthesis.writers import Writer

EndpointOption = Annotated[
    str,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="OpenAI-compatible endpoint of the language model, up to /v1.",
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", help="Name of the language model at the endpoint.")
]
LocalOption = Annotated[
    str,
    typer.Option(
        "--local",
        metavar="CHECKPOINT",
        help="Chat model to run with transformers instead of an endpoint.",
    ),
]
WriterSpecOption = Annotated[
    str,
    typer.Option(
        "--spec",
        help="Diffusion model that writes instead: a preset, a file or a saved model's folder.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder that caches replies (default: beside --out)."),
]
SamplingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sampling",
        metavar="NAME=VALUE",
        help="Sampling parameter of the endpoint, such as temperature=0.7; may be repeated.",
    ),
]
TokensOption = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Maximum length of a reply, in tokens.")
]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", min=1, help="Number of parallel requests, or rows per batch."),
]
WriterDeviceOption = Annotated[
    str,
    typer.Option("--device", help="Device for --local and --spec, such as cpu or cuda."),
]

Rows = Sequence[dict[str, Any]]


def captions(
    manifest: ManifestArgument,
    out: ManifestOutOption,
    endpoint: EndpointOption = "",
    model: ModelOption = "",
    local: LocalOption = "",
    spec: WriterSpecOption = "",
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            help="Question about every recording; may be repeated (default: describe it).",
        ),
    ] = None,
    cache: CacheOption = None,
    sampling: SamplingOption = None,
    max_tokens: TokensOption = 512,
    workers: WorkersOption = 8,
    per_minute: PerMinuteOption = None,
    device: WriterDeviceOption = "cpu",
) -> None:
    """Let a language model answer questions about recordings from their labels."""
    from diffa.data.synthesis.captions import caption_rows
    from diffa.data.synthesis.rows import DESCRIBE

    writer = _writer(
        endpoint, model, local, spec, sampling, max_tokens, workers, per_minute, device
    )
    questions = question or [DESCRIBE]
    _write(manifest, out, writer, cache, lambda rows, w, f: caption_rows(rows, w, questions, f))


def rewrite(
    manifest: ManifestArgument,
    out: ManifestOutOption,
    spec: WriterSpecOption = "",
    endpoint: EndpointOption = "",
    model: ModelOption = "",
    local: LocalOption = "",
    cache: CacheOption = None,
    sampling: SamplingOption = None,
    max_tokens: TokensOption = 128,
    workers: WorkersOption = 8,
    per_minute: PerMinuteOption = None,
    device: WriterDeviceOption = "cpu",
) -> None:
    """Let the diffusion model rewrite the answers in its own words (self-distillation)."""
    from diffa.data.synthesis.captions import rewrite_rows

    writer = _writer(
        endpoint, model, local, spec, sampling, max_tokens, workers, per_minute, device
    )
    _write(manifest, out, writer, cache, rewrite_rows)


def preferences(
    out: ManifestOutOption,
    manifest: Annotated[
        Path | None,
        typer.Argument(
            metavar="MANIFEST", help="Manifest of rows with answers (default: the nano corpus)."
        ),
    ] = None,
    endpoint: EndpointOption = "",
    model: ModelOption = "",
    local: LocalOption = "",
    cache: CacheOption = None,
    sampling: SamplingOption = None,
    max_tokens: TokensOption = 512,
    workers: WorkersOption = 8,
    per_minute: PerMinuteOption = None,
    device: WriterDeviceOption = "cpu",
    judge: Annotated[
        bool,
        typer.Option(
            "--judge/--no-judge", help="Keep only pairs whose right answer the model recognises."
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Random seed for the corruptions.")] = 0,
    count: Annotated[
        int, typer.Option("--count", min=1, help="Number of pairs about the nano corpus.")
    ] = 1000,
    split: Annotated[
        Split, typer.Option("--split", help="Recordings of the nano corpus to use.")
    ] = "train",
    fsdd: FsddOption = "",
) -> None:
    """Pair right answers with answers that get one audio attribute wrong.

    Without MANIFEST the pairs are about the nano corpus, and --out is a folder that also receives
    the audio. With MANIFEST they come from its labels, or from a language model (--endpoint,
    --local).
    """
    if endpoint and local:
        raise SpecError("name one language model: --endpoint or --local, not both")
    if manifest is None:
        if endpoint or local:
            raise SpecError("a language model writes about the rows of a MANIFEST: name one")
        _write_nano_preferences(out, split, seed, count, fsdd)
        return
    from diffa.data.synthesis.preferences import pairs_from_labels, pairs_from_writer

    if not endpoint and not local:
        _write(manifest, out, None, None, lambda rows, w, f: pairs_from_labels(rows, f, seed))
        return
    writer = _writer(endpoint, model, local, "", sampling, max_tokens, workers, per_minute, device)
    _write(
        manifest, out, writer, cache,
        lambda rows, w, f: pairs_from_writer(rows, w, f, seed=seed, judged=judge),
    )  # fmt: skip


def _write_nano_preferences(out: Path, split: Split, seed: int, count: int, fsdd: str) -> None:
    from diffa.nano.preferences import write_preferences

    if out.suffix:
        raise SpecError(f"--out {out}: pairs about the nano corpus come with audio; name a folder")
    print(write_preferences(out, split, seed, count, fsdd=fsdd or None))


def _writer(
    endpoint: str,
    model: str,
    local: str,
    spec: str,
    sampling: Sequence[str] | None,
    max_tokens: int,
    workers: int,
    per_minute: float | None,
    device: str,
) -> Writer:
    """Build the language model that the options name; exactly one must be named."""
    if sum(map(bool, (endpoint, local, spec))) != 1:
        raise SpecError(
            "name one language model: --endpoint URL --model NAME, --local CHECKPOINT or --spec"
        )
    if endpoint:
        from diffa.data.synthesis.remote import EndpointWriter
        from diffa.llm.client import ChatClient

        if not model:
            raise SpecError("--endpoint needs --model: the name of one of its models")
        parameters = dict(parse_override(text, "--sampling") for text in sampling or ())
        return EndpointWriter(
            ChatClient(endpoint, model, per_minute=per_minute),
            sampling={"max_tokens": max_tokens} | parameters,
            workers=workers,
        )
    from diffa.data.synthesis.models import DiffusionWriter, TransformersWriter

    if local:
        return TransformersWriter(local, max_tokens=max_tokens, batch=workers, device=device)
    return DiffusionWriter(
        load_model(spec, None, "", device)[0], max_tokens=max_tokens, batch=workers
    )


def _write(
    manifest: Path,
    out: Path,
    writer: Writer | None,
    cache: Path | None,
    transform: Callable[[Rows, Any, list[Fault]], Rows],
) -> None:
    """Read a manifest, transform its rows, write them, and list the rows that failed."""
    from diffa.data.formats import write_rows
    from diffa.data.samples import DataError, format_faults
    from diffa.data.synthesis.writers import CachedWriter

    source = read_manifests([manifest])
    cached = CachedWriter(writer, cache or out.with_name(f"{out.name}.replies")) if writer else None
    faults: list[Fault] = []
    rows = transform(source, cached, faults)
    print_notes([str(fault) for fault in faults], "rows left out")
    if not rows:
        raise DataError(
            f"nothing to write: no row of {manifest} is left\n{format_faults(faults, 3)}"
        )
    print(write_rows(out, rows))
    replies = f", {cached.num_cached} replies from {cached.folder}" if cached else ""
    print_note(f"{len(rows)} rows{replies}")


def parse_bands(texts: Sequence[str] | None) -> Any:
    """Parse ``--band pitch=110,180``: the limits between a measure's words."""
    from diffa.data.synthesis.attributes import Bands

    limits: dict[str, tuple[float, float]] = {}
    for text in texts or ():
        name, _, numbers = text.partition("=")
        try:
            low, high = (float(number) for number in numbers.split(","))
        except ValueError as error:
            raise SpecError(
                f"--band takes NAME=LOW,HIGH, such as speed=2,4, got {text!r}"
            ) from error
        names = ("man", "woman", "anyone") if name == "pitch" else (name,)
        if not set(names) <= set(Bands._fields) or low > high:
            raise SpecError(f"--band {text}: pitch, {', '.join(Bands._fields)} have LOW <= HIGH")
        limits |= dict.fromkeys(names, (low, high))
    return Bands()._replace(**limits)
