"""Options that choose a spec, and the commands ``diffa spec show | check | list``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffa.cli.output import print_json, print_table, say
from diffa.errors import DiffaError, SpecError, suggest

SPEC = Annotated[
    str, typer.Option("--spec", help="Preset, YAML or JSON file, or a saved model's folder.")
]
SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the spec: sampler.block=16."),
]
SAMPLER_PRESET = Annotated[
    str, typer.Option("--sampler-preset", metavar="NAME", help="Sampler preset: exact, fast, ...")
]
JSON = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
NAMED = Annotated[
    str, typer.Argument(metavar="SPEC", help="Preset, file or a saved model's folder.")
]

app = typer.Typer(help="Show and check specs.", no_args_is_help=True, rich_markup_mode=None)


def read_spec(name: str, changes: list[str] | None, sampler_preset: str = "") -> Any:
    """Return a spec with ``--sampler-preset`` and every ``--set`` applied; raises SpecError."""
    from diffa.spec.spec import Spec

    spec = Spec.read(name)
    if sampler_preset:
        offered = spec.data.get("sampler_presets") or {}
        if sampler_preset not in offered:
            raise SpecError(
                f"{name} has no sampler preset {sampler_preset!r}{suggest(sampler_preset, offered)}"
            )
        spec = spec.set("sampler", sampler_preset)
    return spec.change(dict(parse_change(change) for change in changes or ()))


def parse_change(change: str) -> tuple[str, Any]:
    """Split PATH=VALUE; the value is read as YAML, so 16 is a number and [a, b] a list."""
    from diffa.spec.yaml import parse_yaml

    path, equals, text = change.partition("=")
    if not path.strip() or not equals:
        raise SpecError(f"--set takes PATH=VALUE, such as sampler.block=16, got {change!r}")
    try:
        return path.strip(), parse_yaml(text)
    except SpecError as error:
        raise SpecError(f"--set {change}: {error}; text with ': ' or '#' needs quotes") from error


def default_spec() -> str:
    """The spec that answers when none is named: nano where it ships, else the untrained tiny."""
    import diffa

    if (Path(diffa.__file__).parent / "assets" / "presets" / "nano.yaml").is_file():
        return "nano"
    say(
        "using the preset 'tiny': it is untrained and its answers mean nothing; "
        "for DIFFA's published weights (20 GB) add --spec diffa-1"
    )
    return "tiny"


@app.command("list")
def list_presets() -> None:
    """List the presets that ship with diffa."""
    from diffa.spec.spec import presets

    for name in presets():
        print(name)


@app.command()
def show(
    spec: NAMED,
    changes: SET = None,
    sampler_preset: SAMPLER_PRESET = "",
    parameters: Annotated[
        bool, typer.Option("--parameters", help="Build without weights and count parameters.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Print a spec with every default filled in."""
    resolved = read_spec(spec, changes, sampler_preset).resolve()
    if parameters:
        from diffa.cli.parameters import count

        rows = count(resolved)
        if as_json:
            print_json(rows)
        else:
            print_table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])
        return
    print(resolved.to_json() if as_json else resolved.to_yaml().rstrip())
    say(f"digest {resolved.digest()}")


@app.command()
def check(
    spec: NAMED, changes: SET = None, sampler_preset: SAMPLER_PRESET = "", as_json: JSON = False
) -> None:
    """Check a spec; every fault is reported at once."""
    try:
        digest = read_spec(spec, changes, sampler_preset).digest()
    except DiffaError as error:
        if not as_json:
            raise
        print_json({"spec": spec, "ok": False, "error": str(error)})
        sys.exit(2)
    if as_json:
        print_json({"spec": spec, "ok": True, "digest": digest})
    else:
        print(f"{spec} is a valid spec, digest {digest}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)
