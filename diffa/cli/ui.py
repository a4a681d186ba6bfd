"""The command ``diffa ui``."""

from __future__ import annotations

from typing import Annotated

import typer

from diffa.cli.models import load_model
from diffa.cli.options import (
    DeviceOption,
    DtypeOption,
    SamplerPresetOption,
    SetOption,
    SpecOption,
)
from diffa.runtime.threads import single_core


def ui(
    spec: SpecOption = "",
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on: 127.0.0.1 admits this machine only, 0.0.0.0 all networks.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")
    ] = 7860,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a web page that shows answers forming (needs the extra `ui`)."""
    from diffa.ui.launch import check_address, launch, require

    require()  # before weights are read
    check_address(host, port)
    with single_core():  # the page answers in a thread of its own
        model, name = load_model(spec, overrides, sampler_preset, device, dtype)
    launch(model, name, host=host, port=port, browser=browser)
