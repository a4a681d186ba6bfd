"""The command ``diffa ablate``: train a grid of recipe variants and tabulate the results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffa.cli.options import RecipeArgument, RecipeSetOption, TrainingDeviceOption
from diffa.cli.output import print_note, print_table
from diffa.runtime.files import write_text

if TYPE_CHECKING:
    from diffa.ablation.study import Study


def ablate(
    recipe: RecipeArgument,
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="PATH=A,B",
            help="Values to compare, such as sampler.block_length=8,32 or adapters=semantic,both; "
            "repeat it to run every combination.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Number of random seeds per combination.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study (default: runs/RECIPE-ablation).")
    ] = None,
    overrides: RecipeSetOption = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Command that scores each model; {model} and {json} are replaced by its folder "
            "and the result file (default: none)."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric to compare (default: exact answers, or the loss without them)."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Number of parallel processes; 0 trains in this process.")
    ] = 1,
    device: TrainingDeviceOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the grid without training.")
    ] = False,
) -> None:
    """Train and score every combination of recipe values under several seeds.

    The same command continues a study that was interrupted.
    """
    from diffa.ablation.study import ablate as run_study

    study = run_study(
        recipe,
        vary,
        out=out or Path("runs") / f"{Path(recipe).stem}-ablation",
        seeds=seeds,
        overrides=overrides or [],
        score=score,
        jobs=jobs,
        device=device,
        dry_run=dry_run,
        on_message=print_note,
    )
    if dry_run:
        _print_plan(study)
        return
    print(write_tables(study, metric))
    for name, fault in study.faults.items():
        print_note(f"{name}: {fault}")
    if study.faults:
        raise typer.Exit(1)


def write_tables(study: Study, metric: str | None = None) -> str:
    """Write the study's tables and plot into its folder; return the table as Markdown."""
    from diffa.ablation import plot, table

    text = table.study_markdown(study, metric)
    files = {
        "table.md": text,
        "table.csv": table.summary_csv(study, metric),
        "runs.csv": table.runs_csv(study, metric),
    }
    names = table.metric_names(study, metric)
    if names:
        title = " and ".join(axis.path for axis in study.axes)
        files["plot.svg"] = plot.plot_summary(table.summary_rows(study, metric), names[0], title)
    for name, content in files.items():
        write_text(study.out / name, content)
    return text


def _print_plan(study: Study) -> None:
    """Print every combination: its values, its stages, and the number of finished runs."""
    columns = [*(axis.path for axis in study.axes), "stages", "digest", "results"]
    rows = []
    for runs in study.combinations():
        stages = " ".join(stage.name for stage in runs[0].recipe.stages)
        finished = sum(run.name in study.results for run in runs)
        state = f"{finished} of {len(runs)}"
        rows.append([*runs[0].labels.values(), stages, runs[0].spec_digest, state])
    print_table(columns, rows)
    print_note(f"{len(study.runs)} runs, {len({run.training for run in study.runs})} trainings")
