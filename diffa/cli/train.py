"""The command ``diffa train``, to be mounted by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from diffa.trainers.run import Report


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe that diffa ships, or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the run; runs/NAME by default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where the run in --out stopped.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint of the run.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan.")
    ] = False,
    on_error: Annotated[
        str, typer.Option(help="Unusable rows: 'skip' them, counted, or 'stop'.")
    ] = "stop",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
) -> None:
    """Train a model as a recipe says: stage after stage, resumable at every checkpoint."""
    from diffa.errors import SpecError
    from diffa.trainers.run import train

    if on_error not in ("skip", "stop"):
        raise SpecError(f"--on-error is 'skip' or 'stop', got {on_error!r}")
    report = train(
        recipe,
        out=out or Path("runs") / Path(recipe).stem,
        resume=checkpoint or resume,
        dry_run=dry_run,
        overrides=set_ or [],
        on_error="skip" if on_error == "skip" else "stop",
        device=device,
    )
    show(report, dry_run=dry_run)


def show(report: Report, *, dry_run: bool) -> None:
    """Print a table of the stages, and how to use the model."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("stage", "steps", "rows per epoch", "learning", "left out", "result")
    for stage in report.stages:
        numbers = {k.removeprefix("eval_"): v for k, v in stage.metrics.items()}
        result = " ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        table.add_row(
            stage.name,
            f"{stage.steps:,}",
            f"{stage.rows:,}",
            f"{stage.learning:,}",
            str(stage.skipped),
            result,
        )
    console.print(table)
    if dry_run:
        show_estimates(report, console)
        console.print("A dry run: nothing was trained.")
    else:
        console.print(f"Ask it: diffa ask AUDIO QUESTION --spec {report.folder / 'model'}")


def show_estimates(report: Report, console: Console) -> None:
    """Print what each stage would take: per epoch, and on each device."""
    from rich.table import Table

    names = ("stage", "audio h", "text tokens", "audio embeddings", "memory per device, GiB")
    table = Table(*names, title="Per epoch, and on each device")
    guessed = False
    for stage in report.stages:
        found = stage.estimate
        if found is None:
            continue
        guessed = guessed or found.guessed
        parts = " + ".join(f"{size / 2**30:.1f}" for size in found.memory)
        table.add_row(
            stage.name,
            f"{found.hours:,.1f}",
            f"{found.tokens:,}",
            f"{found.sounds:,}",
            f"{found.memory.total / 2**30:.1f} = {parts}",
        )
    console.print(table)
    console.print("Memory: weights + gradients + optimiser + the longest batch, nothing sharded.")
    if guessed:
        console.print("Tokens are guessed from letters: the tokenizer is not on this machine.")
