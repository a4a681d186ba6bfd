"""The commands ``diffa plugins``, ``diffa plugins check KIND:NAME`` and ``diffa plugin new``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diffa.cli.options import JsonOption
from diffa.cli.output import print_json, print_note, print_table
from diffa.errors import PluginError, SpecError, describe
from diffa.spec import registry

_IMPORT_SECONDS = 20.0  # for the package of one part
_TRIAL = "from diffa.spec.registry import load_part; load_part({!r}, {!r})"

app = typer.Typer(
    help="List and check the installed parts.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
author = typer.Typer(help="Write a new plugin.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def list_plugins(
    context: typer.Context,
    as_json: JsonOption = False,
    names: Annotated[
        bool,
        typer.Option("--names", help="List names without importing the parts or checking them."),
    ] = False,
) -> None:
    """List every installed part, its package and whether it works."""
    if context.invoked_subcommand:
        return
    parts = [part for kind in registry.PLUGIN_KINDS for part in registry.list_parts(kind)]
    health = {} if names else _health(parts)
    rows = [_row(part, health.get(part)) for part in parts]
    for fault in registry.scan_faults():
        print_note(fault)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [list(row.values()) for row in rows])


@app.command("check")
def check_plugin(
    name: Annotated[
        str, typer.Argument(metavar="KIND:NAME", help="Part to check, such as adapter:conv.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Import a part, check it against the contract of its kind and show its options."""
    from diffa.spec.schema import describe_type, read_schema

    kind, colon, short = name.partition(":")
    if not colon or not short:
        raise SpecError(f"a part is named KIND:NAME, such as adapter:conv, got {name!r}")
    part = registry.find_part(kind, short)
    if (state := _health([part])[part]) != "works":
        raise PluginError(state.removeprefix("broken: "))
    signature = read_schema(registry.load_part(kind, short))
    options = [
        {"option": key, "type": describe_type(option.hint), "default": option.default}
        for key, option in signature.options.items()
    ]
    if as_json:
        print_json({**part._asdict(), "wires": list(signature.wires), "options": options})
        return
    print(f"{part.origin}, version {part.version}: works")
    print(f"wires: {', '.join(signature.wires) or 'none'}")
    if options:
        rows = [["null" if v is None else str(v) for v in row.values()] for row in options]
        print_table(list(options[0]), rows)
    if kind in registry.KINDS:
        print_note(
            f"next: run the conformance suite for {kind}s of diffa.testing in the part's tests"
        )


@author.callback()
def plugin() -> None:
    """Write a new plugin."""


@author.command("new")
def new_plugin(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the package and of its part in specs.")
    ],
    kind: Annotated[
        str, typer.Option("--kind", help=f"Kind of the part: {', '.join(registry.KINDS)}.")
    ] = "adapter",
) -> None:
    """Write a package NAME in this folder, with one part that passes its own tests."""
    from diffa.cli import scaffold

    result = scaffold.write_plugin(name, kind, Path())
    for path in result.files:
        print(path)
    print_note("next: " + "; ".join(result.next))


def _row(part: registry.Part, health: str | None) -> dict[str, str]:
    row = {
        "kind": part.kind,
        "name": registry.short_name(part),
        "package": f"{part.dist} {part.version}",
        "target": part.target,
    }
    return row if health is None else {**row, "health": health}


def _health(parts: list[registry.Part]) -> dict[registry.Part, str]:
    """Say of each part whether it can be imported; another package's in a process with a limit."""
    from diffa.cli.doctor import attempt_apart

    trials = {
        json.dumps(part): _TRIAL.format(part.kind, f"{part.dist}:{part.name}")
        for part in parts
        if not part.is_builtin
    }
    states = attempt_apart(trials, _IMPORT_SECONDS)
    return {
        part: states[json.dumps(part)][0].replace("diffa.errors.PluginError: ", "")
        if json.dumps(part) in states
        else _own_health(part)
        for part in parts
    }


def _own_health(part: registry.Part) -> str:
    try:
        registry.load_part(part.kind, f"{part.dist}:{part.name}")
    except Exception as error:  # an optional library may fail in any way
        return f"broken: {describe(error)}"
    return "works"
