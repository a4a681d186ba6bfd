"""The command ``diffa train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffa.cli.options import RecipeArgument, RecipeSetOption, TrainingDeviceOption

if TYPE_CHECKING:
    from rich.console import Console

    from diffa.trainers.run import Report


def train(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (default: runs/RECIPE).")
    ] = None,
    overrides: RecipeSetOption = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in --out from its last checkpoint.")
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the run to continue from (default: its last)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan without training.")
    ] = False,
    on_error: Annotated[
        Literal["skip", "stop"],
        typer.Option(help="Reaction to unusable rows: 'skip' counts and skips them, 'stop' exits."),
    ] = "stop",
    device: TrainingDeviceOption = None,
) -> None:
    """Train a model by a recipe, stage after stage; every checkpoint can be resumed."""
    from diffa.trainers.run import train as run_recipe

    report = run_recipe(
        recipe,
        out=out or Path("runs") / Path(recipe).stem,
        resume=checkpoint or resume,
        dry_run=dry_run,
        overrides=overrides or [],
        on_error=on_error,
        device=device,
    )
    _print_report(report, dry_run=dry_run)


def _print_report(report: Report, *, dry_run: bool) -> None:
    """Print a table of the stages, and how to use the model."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # names and paths may hold brackets
    table = Table("stage", "steps", "rows per epoch", "trainable", "skipped", "result")
    for stage in report.stages:
        numbers = {k.removeprefix("eval_"): v for k, v in stage.metrics.items()}
        result = " ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        table.add_row(
            stage.name,
            f"{stage.steps:,}",
            f"{stage.rows:,}",
            f"{stage.trained:,}",
            str(stage.skipped),
            result,
        )
    console.print(table)
    if dry_run:
        _print_estimates(report, console)
        console.print("Dry run: nothing was trained.")
    else:
        console.print(f"Next: diffa ask AUDIO QUESTION --spec {report.folder / 'model'}")


def _print_estimates(report: Report, console: Console) -> None:
    """Print what each stage needs: per epoch, and on each device."""
    from rich.table import Table

    names = ("stage", "audio h", "text tokens", "audio embeddings", "memory per device, GiB")
    table = Table(*names, title="Per epoch, and on each device")
    estimates = [(stage.name, stage.estimate) for stage in report.stages if stage.estimate]
    for name, estimate in estimates:
        parts = " + ".join(f"{size / 2**30:.1f}" for size in estimate.memory)
        table.add_row(
            name,
            f"{estimate.hours:,.1f}",
            f"{estimate.tokens:,}",
            f"{estimate.audio_embeddings:,}",
            f"{estimate.memory.total / 2**30:.1f} = {parts}",
        )
    console.print(table)
    console.print("Memory: weights + gradients + optimizer + the longest batch, without sharding.")
    if any(estimate.approximate for _, estimate in estimates):
        console.print("Token counts are estimated from letters: the tokenizer is not available.")
