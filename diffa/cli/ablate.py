"""The command ``diffa ablate``: a grid over a recipe, and the table that comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffa.cli.output import say
from diffa.runtime.files import write_text

if TYPE_CHECKING:
    from diffa.ablation.study import Study


def ablate(
    recipe: Annotated[str, typer.Argument(help="A recipe that diffa ships, or a YAML file.")],
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="PATH=A,B",
            help="What to compare: adapters=semantic,both; backbone=llada,llama; "
            "sampler.block=8,32; stages.0.optimizer.lr=1e-4,1e-3. May be repeated: every "
            "combination is run.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Repetitions of every combination.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the study; runs/NAME-ablation by default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe for all runs."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="Command that measures a model: words {model} and {json} are replaced."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="The number to compare by; exact answers or the loss.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at once; 0: in this one.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the grid.")
    ] = False,
) -> None:
    """Train and measure every combination under several seeds; run it again to go on."""
    from diffa.ablation.study import ablate as run

    place = out or Path("runs") / f"{Path(recipe).stem}-ablation"
    study = run(
        recipe,
        vary,
        out=place,
        seeds=seeds,
        overrides=set_ or [],
        score=score,
        jobs=jobs,
        device=device,
        dry_run=dry_run,
        say=say,
    )
    if dry_run:
        _plan(study)
        return
    print(write(study, metric))
    for name, fault in study.faults.items():
        say(f"{name}: {fault}")
    if study.faults:
        raise typer.Exit(1)


def write(study: Study, metric: str | None = None) -> str:
    """Write the study's tables and picture into its folder; return the table as Markdown."""
    from diffa.ablation import plot, table

    text = table.markdown(study, metric)
    files = {
        "table.md": text,
        "table.csv": table.summary_csv(study, metric),
        "runs.csv": table.runs_csv(study, metric),
    }
    names = table.metrics(study, metric)
    if names:
        title = " and ".join(axis.path for axis in study.axes)
        files["plot.svg"] = plot.draw(table.rows(study, metric), names[0], title)
    for name, content in files.items():
        write_text(study.out / name, content)
    return text


def _plan(study: Study) -> None:
    """Show every combination: its values, what it trains, and which results there are."""
    from diffa.cli.output import print_table

    columns = [*(axis.path for axis in study.axes), "stages", "digest", "results"]
    rows = []
    for cells in study.groups():
        stages = " ".join(stage.name for stage in cells[0].recipe.stages)
        there = sum(cell.name in study.results for cell in cells)
        own = [*cells[0].settings.values(), stages, cells[0].digest, f"{there} of {len(cells)}"]
        rows.append(own)
    print_table(columns, rows)
    say(f"{len(study.cells)} runs, {len({c.training for c in study.cells})} trainings")
