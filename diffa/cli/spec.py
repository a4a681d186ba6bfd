"""The commands ``diffa spec list | show | check``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffa.cli.models import read_spec
from diffa.cli.options import JsonOption, SamplerPresetOption, SetOption, SpecArgument
from diffa.cli.output import print_json, print_note, print_table
from diffa.errors import DiffaError

app = typer.Typer(help="List, show and check specs.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_specs() -> None:
    """List the presets that ship with diffa."""
    from diffa.spec.spec import presets

    for name in presets():
        print(name)


@app.command("show")
def show_spec(
    spec: SpecArgument,
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    parameters: Annotated[
        bool,
        typer.Option("--parameters", help="Show each part's parameter count instead."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a spec with all defaults filled in."""
    resolved = read_spec(spec, overrides, sampler_preset).resolve()
    if parameters:
        from diffa.cli.parameters import count_parameters

        rows = count_parameters(resolved)
        if as_json:
            print_json(rows)
        else:
            print_table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])
        return
    print(resolved.to_json() if as_json else resolved.to_yaml().rstrip())
    print_note(f"digest {resolved.digest()}")


@app.command("check")
def check_spec(
    spec: SpecArgument,
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    as_json: JsonOption = False,
) -> None:
    """Check a spec and report all its errors at once."""
    try:
        digest = read_spec(spec, overrides, sampler_preset).digest()
    except DiffaError as error:
        if not as_json:
            raise
        print_json({"spec": spec, "ok": False, "error": str(error)})
        raise typer.Exit(2) from error
    if as_json:
        print_json({"spec": spec, "ok": True, "digest": digest})
    else:
        print(f"{spec} is a valid spec, digest {digest}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)
