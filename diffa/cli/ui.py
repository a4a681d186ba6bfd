"""The command ``diffa ui``."""

from __future__ import annotations

from typing import Annotated

import typer

from diffa.cli.ask import DEVICE, DTYPE, SPEC, load_model
from diffa.cli.spec import SAMPLER_PRESET, SET
from diffa.runtime.threads import single_core


def ui(
    spec: SPEC = "",
    changes: SET = None,
    sampler_preset: SAMPLER_PRESET = "",
    device: DEVICE = "auto",
    dtype: DTYPE = None,
    host: Annotated[
        str, typer.Option("--host", help="127.0.0.1: this machine alone; 0.0.0.0: everyone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where to listen.")] = 7860,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Open a page on which answers can be watched forming (needs the extra `ui`)."""
    from diffa.ui.launch import launch, require

    require()  # before weights are read
    with single_core():  # the page answers in a thread of its own
        model, name = load_model(spec, changes, sampler_preset, device, dtype)
    launch(model, name, host=host, port=port, browser=browser)
