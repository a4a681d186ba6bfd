"""The commands that make data: ``diffa data nano``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from diffa.cli.output import say
from diffa.errors import SpecError

app = typer.Typer(help="Make training data.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Make training data."""


@app.command()
def nano(
    out: Annotated[Path, typer.Option("--out", help="Folder for audio/ and the manifest.")],
    split: Annotated[str, typer.Option("--split", help="train or test recordings.")] = "train",
    count: Annotated[int, typer.Option("--count", min=1, help="Rows to write.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Another seed, another corpus.")] = 0,
    per: Annotated[int, typer.Option("--per", min=1, help="Questions per utterance.")] = 1,
    form: Annotated[str, typer.Option("--format", help="jsonl or json.")] = "jsonl",
    fsdd: Annotated[str, typer.Option("--fsdd", help="Folder of the FSDD recordings.")] = "",
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", help="A speaker to leave out.")
    ] = None,
) -> None:
    """Write the nano corpus: spoken digits, sounds and melodies with questions about them."""
    if split not in ("train", "test"):
        raise SpecError(f"--split is 'train' or 'test', got {split!r}")
    if form not in ("jsonl", "json"):
        raise SpecError(f"--format is 'jsonl' or 'json', got {form!r}")
    from diffa.data.nano.corpus import write_corpus

    manifest = write_corpus(
        out,
        cast(Literal["train", "test"], split),
        seed,
        count,
        fsdd=fsdd or None,
        leave_out=tuple(leave_out or ()),
        per=per,
        form=cast(Literal["json", "jsonl"], form),
    )
    print(manifest)
    say(f"{count} rows of the {split} recordings, seed {seed}")
