"""The command that serves a model: ``diffa serve``."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from diffa.cli.ask import DEVICE, DTYPE, SPEC, load_model
from diffa.cli.map import GPUS, RAY, find_source
from diffa.cli.output import say
from diffa.cli.spec import SAMPLER_PRESET, SET, default_spec
from diffa.errors import SpecError

KEYS = "DIFFA_API_KEYS"


def serve(
    spec: SPEC = "",
    changes: SET = None,
    sampler_preset: SAMPLER_PRESET = "",
    device: DEVICE = "auto",
    dtype: DTYPE = None,
    name: Annotated[str, typer.Option("--name", help="What clients call the model.")] = "",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Requests at a time.")] = 16,
    waiting: Annotated[
        int, typer.Option("--waiting", min=1, help="Requests that may wait; more get 429.")
    ] = 64,
    max_bytes: Annotated[
        int, typer.Option("--max-bytes", min=1024, help="Of a request's body.")
    ] = 32 * 2**20,
    max_audio: Annotated[
        float, typer.Option("--max-audio", min=0.1, help="Seconds of a recording.")
    ] = 600.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of an answer, at most.")
    ] = 1024,
    deadline: Annotated[
        float, typer.Option("--deadline", min=0.1, help="Seconds until an answer must be there.")
    ] = 300.0,
    remember: Annotated[
        int, typer.Option("--remember", min=0, help="Audio embeddings kept for more questions.")
    ] = 8192,
    drain: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds to finish in at shutdown.")
    ] = 30.0,
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-keys", help=f"File with one key per line; or the variable {KEYS}."),
    ] = None,
    fetch_from: Annotated[
        list[str] | None,
        typer.Option("--fetch-from", help="HOST[:PORT] that audio_url may name; none without."),
    ] = None,
    ray: RAY = None,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="With --ray: models at once.")
    ] = 1,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="With --ray: CPU threads per replica.")
    ] = 1,
    gpus: GPUS = 0.0,
) -> None:
    """Serve a model in OpenAI's protocol: chat completions and transcriptions."""
    _check_extra()
    from diffa.serving.limits import Limits
    from diffa.serving.ray_serve import Replicas, Served
    from diffa.serving.ray_serve import serve as run_replicas
    from diffa.serving.run import bind
    from diffa.serving.run import serve as run

    _check_ray(ray, port, alone=(replicas, threads, gpus) == (1, 1, 0.0))
    keys, found = read_keys(api_keys), spec or default_spec()
    limits = Limits(
        rows=rows, waiting=waiting, bytes=max_bytes, audio=max_audio, tokens=max_tokens,
        deadline=deadline, remember=remember, drain=drain,
    )  # fmt: skip
    hosts = [place.lower() for place in fetch_from or ()]
    options = (found, changes, sampler_preset, device, dtype)
    load = partial(_load, *options) if ray is None else _travelling(*options, gpus=gpus)
    served = Served(load, name or Path(found).stem, limits, keys, hosts)
    shown = f"{served.name} at http://{host}:{{}}/v1, {'with' if keys else 'without'} API keys"
    if ray is not None:
        each = Replicas(replicas, threads, gpus)
        told = f"{shown.format(port)}, {replicas} replicas"
        run_replicas(served, host, port, ray, each, lambda: say(told))
        return
    taken = bind(host, port)  # before a model is loaded in vain
    service = served.service()
    say(shown.format(taken.getsockname()[1]))
    run(service, taken)


def read_keys(path: Path | None) -> list[str]:
    """API keys of a file, one per line, or of the environment, with commas between.

    Raises:
        SpecError: the file cannot be read or holds none.
    """
    if path is None:
        return [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--api-keys {path} cannot be read: {error}") from error
    if not (keys := [key for key in keys if key]):
        raise SpecError(f"--api-keys {path} holds no key")
    return keys


def _load(*options: Any) -> Any:
    return load_model(*options)[0]


def _travelling(
    name: str,
    changes: list[str] | None,
    sampler_preset: str,
    device: str,
    dtype: str | None,
    gpus: float,
) -> Callable[[], Any]:
    """What loads the model on another machine, whose devices may be others than those here."""
    place = ("cuda" if gpus else "cpu") if device == "auto" else device
    return find_source(name, changes, sampler_preset, place, dtype).load


def _check_ray(ray: str | None, port: int, *, alone: bool) -> None:
    """Refuse options that go together with others; raises SpecError."""
    if ray is None and not alone:
        raise SpecError("--replicas, --threads and --gpus need --ray: an address, auto or local")
    if ray is not None and not port:
        raise SpecError("--ray needs a --port: its proxies cannot choose one")


def _check_extra() -> Any:
    """Say which extra is missing before a model is loaded."""
    import importlib

    for library in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise SpecError(
                f"diffa serve needs {library}: pip install 'diffa-audio[serve]'"
            ) from error
