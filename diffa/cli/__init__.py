"""The command ``diffa``: ask a model, look at parts and specs, see what works here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from diffa.cli import (
    ablate as ablation,
)
from diffa.cli import (
    ask as answers,
)
from diffa.cli import (
    data as corpora,
)
from diffa.cli import (
    eval as evaluation,
)
from diffa.cli import (
    map as mapping,
)
from diffa.cli import (
    plugins,
)
from diffa.cli import (
    serve as serving,
)
from diffa.cli import (
    spec as specs,
)
from diffa.cli import (
    ui as page,
)
from diffa.cli.output import print_json, print_table, say
from diffa.cli.train import train
from diffa.errors import DiffaError, SpecError

app = typer.Typer(
    help="Large audio-language models whose language model is a masked-diffusion one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(answers.ask)
app.command()(answers.transcribe)
app.command()(serving.serve)
app.command("map")(mapping.map_)
app.command()(train)
app.command()(ablation.ablate)
app.command()(page.ui)
app.add_typer(corpora.app, name="data")
app.add_typer(evaluation.app, name="eval")
app.add_typer(plugins.app, name="plugins")
app.add_typer(plugins.author, name="plugin")
app.add_typer(specs.app, name="spec")


def _version(wanted: bool) -> None:
    if wanted:
        import diffa

        print(f"diffa {diffa.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,
) -> None:
    """Large audio-language models whose language model is a masked-diffusion one."""


@app.command()
def demo() -> None:
    """Show a model at work on a recording that ships with diffa."""
    import importlib

    importlib.import_module("diffa.nano.demo").run()


@app.command()
def doctor(as_json: specs.JSON = False) -> None:
    """Show which libraries work here; exit 1 where a required one does not."""
    from diffa.cli.doctor import examine

    findings = examine()
    rows = [finding.row() for finding in findings]
    if as_json:
        print_json(rows)
    else:
        print_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    ill = [finding.name for finding in findings if finding.ill]
    if ill:
        say(f"required and not working: {', '.join(ill)}")
        raise typer.Exit(1)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; faults become one message on stderr, exit code 2 for usage, else 1."""
    words = sys.argv[1:] if words is None else words
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], prog_name="diffa")
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, DiffaError)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        kind = "" if known else f"{type(error).__name__}: "
        hint = "" if known else "\nadd --debug to see where this came from"
        say(f"diffa: {kind}{error}{notes}{hint}")
        sys.exit(2 if isinstance(error, SpecError) else 1)
