"""The command ``diffa``: ask a model, train and serve it, look at parts and specs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from diffa.cli.ablate import ablate
from diffa.cli.ask import ask, transcribe
from diffa.cli.data import app as data_app
from diffa.cli.eval import app as eval_app
from diffa.cli.fetch import fetch
from diffa.cli.map import map_manifest
from diffa.cli.options import JsonOption
from diffa.cli.output import print_json, print_note, print_table
from diffa.cli.plugins import app as plugins_app
from diffa.cli.plugins import author as plugin_app
from diffa.cli.serve import serve
from diffa.cli.spec import app as spec_app
from diffa.cli.train import train
from diffa.cli.ui import ui
from diffa.errors import DiffaError, SpecError, describe

app = typer.Typer(
    help="Audio-language models whose language model is a masked-diffusion one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (ask, transcribe, serve, train, ablate, ui, fetch):
    app.command()(command)
app.command("map")(map_manifest)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(plugins_app, name="plugins")
app.add_typer(plugin_app, name="plugin")
app.add_typer(spec_app, name="spec")


def _version(requested: bool) -> None:
    if requested:
        import diffa

        print(f"diffa {diffa.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", hidden=True, help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Audio-language models whose language model is a masked-diffusion one."""


@app.command()
def demo() -> None:
    """Run the model nano on a recording that ships with diffa."""
    import importlib

    importlib.import_module("diffa.nano.demo").run()


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show which libraries work here; exit code 1 if a required one does not."""
    from diffa.cli.doctor import examine

    findings = examine()
    rows = [finding.row() for finding in findings]
    if as_json:
        print_json(rows)
    else:
        print_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    broken = [finding.name for finding in findings if finding.blocks]
    if broken:
        print_note(f"required and not working: {', '.join(broken)}")
        raise typer.Exit(1)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; an error becomes one message on stderr.

    Exit codes: 2 for wrong usage and wrong specs, 1 for every other error.
    """
    words = sys.argv[1:] if words is None else words
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], prog_name="diffa")
    except BrokenPipeError:  # the program that reads the output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        # A disk's or a name's errors say what they mean: only the unexpected ones need a traceback.
        clear = isinstance(error, DiffaError | OSError | UnicodeError)
        hint = "" if clear else "\nadd --debug to see where this came from"
        print_note(f"diffa: {describe(error)}{notes}{hint}")
        sys.exit(2 if isinstance(error, SpecError) else 1)
