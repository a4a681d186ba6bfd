"""The commands that let a language model write data: ``diffa data captions | rewrite | ...``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from diffa.cli.output import say
from diffa.errors import SpecError

MANIFEST = Annotated[Path, typer.Argument(metavar="MANIFEST", help=".json, .jsonl or .parquet.")]
OUT = Annotated[Path, typer.Option("--out", help="File to write: .json, .jsonl or .parquet.")]
ENDPOINT = Annotated[
    str, typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible, up to /v1.")
]
MODEL = Annotated[str, typer.Option("--model", help="As the endpoint names it.")]
LOCAL = Annotated[
    str, typer.Option("--local", metavar="CHECKPOINT", help="A chat model of transformers.")
]
SPEC = Annotated[
    str, typer.Option("--spec", help="A diffusion backbone: preset, file or saved model.")
]
CACHE = Annotated[
    Path | None, typer.Option("--cache", help="Folder of replies [default: beside --out].")
]
SAMPLING = Annotated[
    list[str] | None,
    typer.Option("--sampling", metavar="NAME=VALUE", help="temperature=0.7, seed=1 ..."),
]
TOKENS = Annotated[int, typer.Option("--max-tokens", min=1, help="Of a reply.")]
WORKERS = Annotated[int, typer.Option("--workers", min=1, help="Requests (or rows) at once.")]
RATE = Annotated[
    float | None, typer.Option("--per-minute", min=0.01, help="Requests per minute at most.")
]
DEVICE = Annotated[str, typer.Option("--device", help="cpu, cuda ..., for --local and --spec.")]


def captions(
    manifest: MANIFEST,
    out: OUT,
    endpoint: ENDPOINT = "",
    model: MODEL = "",
    local: LOCAL = "",
    spec: SPEC = "",
    question: Annotated[
        list[str] | None, typer.Option("--question", help="Asked of every recording.")
    ] = None,
    cache: CACHE = None,
    sampling: SAMPLING = None,
    max_tokens: TOKENS = 512,
    workers: WORKERS = 8,
    per_minute: RATE = None,
    device: DEVICE = "cpu",
) -> None:
    """Let a language model answer questions about recordings from what their rows say of them."""
    from diffa.data.synthesis.captions import caption
    from diffa.data.synthesis.rows import DESCRIBE

    asked = writer(endpoint, model, local, spec, sampling, max_tokens, workers, per_minute, device)
    _written(manifest, out, asked, cache, lambda r, w, f: caption(r, w, question or [DESCRIBE], f))


def rewrite(
    manifest: MANIFEST,
    out: OUT,
    spec: SPEC = "",
    endpoint: ENDPOINT = "",
    model: MODEL = "",
    local: LOCAL = "",
    cache: CACHE = None,
    sampling: SAMPLING = None,
    max_tokens: TOKENS = 128,
    workers: WORKERS = 8,
    per_minute: RATE = None,
    device: DEVICE = "cpu",
) -> None:
    """Let the diffusion backbone put answers in its own words (self-distillation)."""
    from diffa.data.synthesis.captions import rewrite as rewritten

    asked = writer(endpoint, model, local, spec, sampling, max_tokens, workers, per_minute, device)
    _written(manifest, out, asked, cache, rewritten)


def preferences(
    out: OUT,
    manifest: Annotated[
        Path | None, typer.Argument(metavar="MANIFEST", help="Rows with answers; none: nano's.")
    ] = None,
    endpoint: ENDPOINT = "",
    model: MODEL = "",
    local: LOCAL = "",
    cache: CACHE = None,
    sampling: SAMPLING = None,
    max_tokens: TOKENS = 512,
    workers: WORKERS = 8,
    per_minute: RATE = None,
    device: DEVICE = "cpu",
    judged: Annotated[
        bool, typer.Option("--judge/--no-judge", help="Keep pairs that the model tells apart.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of what is got wrong.")] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="Pairs about nano.")] = 1000,
    split: Annotated[str, typer.Option("--split", help="nano's train or test.")] = "train",
    fsdd: Annotated[str, typer.Option("--fsdd", help="Folder of the FSDD recordings.")] = "",
) -> None:
    """Pair right answers with ones that get a single audio attribute wrong.

    Without MANIFEST the pairs are about the nano corpus, written with its audio into the folder
    --out; with one, from its attributes, or by a language model (--endpoint, --local).
    """
    if endpoint and local:
        raise SpecError("say who writes: --endpoint or --local, not both")
    if manifest is None:
        if endpoint or local:
            raise SpecError("a language model writes about the rows of a MANIFEST: name one")
        _nano_preferences(out, split, seed, count, fsdd)
        return
    from diffa.data.synthesis.preferences import from_labels, from_writer

    if not endpoint and not local:
        _written(manifest, out, None, None, lambda r, w, f: from_labels(r, f, seed))
        return
    asked = writer(endpoint, model, local, "", sampling, max_tokens, workers, per_minute, device)
    _written(
        manifest, out, asked, cache, lambda r, w, f: from_writer(r, w, f, seed=seed, judged=judged)
    )


def _nano_preferences(out: Path, split: str, seed: int, count: int, fsdd: str) -> None:
    from diffa.nano.preferences import write_preferences

    if split not in ("train", "test"):
        raise SpecError(f"--split is 'train' or 'test', got {split!r}")
    if out.suffix:
        raise SpecError(f"--out {out}: pairs about nano come with audio; name a folder")
    chosen = cast(Literal["train", "test"], split)
    print(write_preferences(out, chosen, seed, count, fsdd=fsdd or None))


def writer(
    endpoint: str,
    model: str,
    local: str,
    spec: str,
    sampling: Sequence[str] | None,
    max_tokens: int,
    workers: int,
    per_minute: float | None,
    device: str,
) -> Any:
    """Make the one writer that was asked for; raises SpecError where it is none or several."""
    if sum(map(bool, (endpoint, local, spec))) != 1:
        raise SpecError("say who writes: --endpoint URL --model NAME, --local CHECKPOINT or --spec")
    if endpoint:
        from diffa.data.synthesis.remote import Remote
        from diffa.llm.client import Endpoint

        if not model:
            raise SpecError("--endpoint needs --model: which of its models is to write?")
        given = {"max_tokens": max_tokens} | dict(_option(one) for one in sampling or ())
        asked = Endpoint(endpoint, model, per_minute=per_minute)
        return Remote(asked, sampling=given, workers=workers)
    from diffa.data.synthesis.models import Backbone, Local

    if local:
        return Local(local, max_tokens=max_tokens, batch=workers, device=device)
    from diffa.cli.ask import load_model

    return Backbone(load_model(spec, None, "", device)[0], max_tokens=max_tokens, batch=workers)


def _option(text: str) -> tuple[str, Any]:
    from diffa.cli.spec import parse_change

    try:
        return parse_change(text)
    except SpecError as error:
        raise SpecError(str(error).replace("--set", "--sampling", 1)) from error


def _written(manifest: Path, out: Path, asked: Any, cache: Path | None, make: Any) -> None:
    """Read, let ``make`` work on the rows, write, and say what was left out."""
    from diffa.data.formats import write_rows
    from diffa.data.samples import DataError, Fault, listed
    from diffa.data.synthesis.writers import Kept

    rows = all_rows([manifest])
    kept = asked and Kept(asked, cache or out.with_name(f"{out.name}.replies"))
    faults: list[Fault] = []
    made = make(rows, kept, faults)
    tell([str(fault) for fault in faults], "rows left out")
    if not made:
        raise DataError(f"nothing to write: no row of {manifest} is left\n{listed(faults, 3)}")
    print(write_rows(out, made))
    say(f"{len(made)} rows" + (f", {kept.found} replies from {kept.folder}" if kept else ""))


def all_rows(manifests: Iterable[Path]) -> list[dict[str, Any]]:
    """Read manifests one after another; rows that are not rows are told on stderr.

    Raises:
        DataError: a file cannot be read, or there is no row in any.
    """
    from diffa.data.formats import read_rows
    from diffa.data.samples import DataError

    rows: list[dict[str, Any]] = []
    for path in manifests:
        found, faults = read_rows(path)
        tell([f"{path} {fault}" for fault in faults], "rows left out")
        rows += found
    if not rows:
        raise DataError(f"no usable row in {', '.join(str(path) for path in manifests)}")
    return rows


def tell(lines: Sequence[str], what: str, shown: int = 10) -> None:
    """Write the first of some findings to stderr, under their number."""
    if lines:
        say(f"{len(lines)} {what}:")
        for line in lines[:shown]:
            say(f"  {line}")
        if len(lines) > shown:
            say(f"  and {len(lines) - shown} more")


def shown(rows: Iterable[Any], total: int) -> list[Any]:
    """Collect rows behind a bar on stderr; without a terminal there is no bar."""
    from rich.console import Console
    from rich.progress import track

    return list(
        track(
            rows,
            "recordings",
            total=total,
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
    )


def bands(given: Sequence[str] | None) -> Any:
    """Read ``--band pitch=110,180``: where the words of a measure change; raises SpecError."""
    from diffa.data.synthesis.attributes import Bands

    changes: dict[str, tuple[float, float]] = {}
    for text in given or ():
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
        changes |= dict.fromkeys(names, (low, high))
    return Bands()._replace(**changes)
