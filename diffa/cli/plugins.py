"""The commands ``diffa plugins``, ``diffa plugins check KIND:NAME`` and ``diffa plugin new``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffa.cli.output import print_json, print_table, say
from diffa.cli.spec import JSON
from diffa.errors import DiffaError, SpecError
from diffa.spec import registry

app = typer.Typer(
    help="List and check the parts that are installed.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


author = typer.Typer(help="Write plugins of your own.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def plugins(
    context: typer.Context,
    as_json: JSON = False,
    names: Annotated[
        bool, typer.Option("--names", help="Import nothing: leave the health column out.")
    ] = False,
) -> None:
    """List every installed part, where it comes from and whether it works."""
    if context.invoked_subcommand:
        return
    rows = [
        _row(part, names) for kind in registry.PLUGIN_KINDS for part in registry.list_parts(kind)
    ]
    for fault in registry.scan_faults():
        say(fault)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [list(row.values()) for row in rows])


@app.command()
def check(
    part: Annotated[str, typer.Argument(metavar="KIND:NAME", help="Such as adapter:conv.")],
    as_json: JSON = False,
) -> None:
    """Import one part, check it against its kind's contract and show its schema."""
    from diffa.spec.schema import describe_type, read_schema

    kind, colon, name = part.partition(":")
    if not colon or not name:
        raise SpecError(f"a part is named KIND:NAME, such as adapter:conv, got {part!r}")
    found, cls = registry.find_part(kind, name), registry.load_part(kind, name)
    known = read_schema(cls)
    options = [
        {"option": key, "type": describe_type(option.hint), "default": option.default}
        for key, option in known.options.items()
    ]
    if as_json:
        print_json({**found._asdict(), "wires": list(known.wires), "options": options})
        return
    print(f"{found.origin}, version {found.version}: works")
    print(f"wires: {', '.join(known.wires) or 'none'}")
    if options:
        print_table(list(options[0]), [[str(_shown(v)) for v in row.values()] for row in options])
    if kind in registry.KINDS:
        say(f"diffa.testing has a conformance suite for {kind}s: run it in the part's own tests")


@author.callback()
def plugin() -> None:
    """Write plugins of your own."""


@author.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The part's name in specs.")],
    kind: Annotated[str, typer.Option("--kind", help=", ".join(registry.KINDS))] = "adapter",
) -> None:
    """Write a package NAME in this folder, with one part that passes its own tests."""
    from diffa.cli import scaffold

    made = scaffold.new(name, kind, Path())
    for path in made.files:
        print(path)
    say("then: " + "; ".join(made.next))


def _row(part: registry.Part, names: bool) -> dict[str, str]:
    row = {
        "kind": part.kind,
        "name": registry.short_name(part),
        "package": f"{part.dist} {part.version}",
        "target": part.target,
    }
    return row if names else {**row, "health": _health(part)}


def _health(part: registry.Part) -> str:
    try:
        registry.load_part(part.kind, f"{part.dist}:{part.name}")
    except DiffaError as error:
        return f"broken: {error}"
    except Exception as error:  # a part of any kind of brokenness is listed, not raised
        return f"broken: {type(error).__name__}: {error}"
    return "works"


def _shown(value: Any) -> Any:
    return "null" if value is None else value
