"""The command ``diffa fetch``: put published weights on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from diffa.cli.output import print_note


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="Hub ids such as openai/whisper-base, or whisper-base alone."
        ),
    ],
) -> None:
    """Find published weights in the Hub's cache or installed packages, or download them."""
    from diffa.checkpoints.packages import PACKAGED
    from diffa.checkpoints.read import find_checkpoint

    short = {name.partition("/")[2]: name for name in PACKAGED}
    for name in names:
        folder = find_checkpoint(short.get(name, name))
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        print(folder)
        print_note(f"{short.get(name, name)}: {size / 1e6:.0f} MB")
