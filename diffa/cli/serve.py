"""The command ``diffa serve``: a model behind OpenAI's protocol."""

from __future__ import annotations

import importlib
import ipaddress
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from diffa.cli.models import default_spec, load_model, model_source
from diffa.cli.options import (
    DeviceOption,
    DtypeOption,
    GpusOption,
    RayOption,
    SamplerPresetOption,
    SetOption,
    SpecOption,
)
from diffa.cli.output import print_note
from diffa.errors import SpecError

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.serving.ray_serve import Deployment, ReplicaConfig

KEYS = "DIFFA_API_KEYS"

NameOption = Annotated[
    str,
    typer.Option("--name", help="Model name that clients use (default: the spec's name)."),
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on.")]
PortOption = Annotated[
    int,
    typer.Option(
        "--port", min=0, max=65535, help="Port to listen on. 0 takes a free port; not with --ray."
    ),
]
BatchOption = Annotated[
    int, typer.Option("--max-batch-size", min=1, help="Maximum number of requests per batch.")
]
WaitingOption = Annotated[
    int,
    typer.Option(
        "--max-waiting", min=1, help="Maximum number of waiting requests; more are refused (429)."
    ),
]
BytesOption = Annotated[
    int, typer.Option("--max-bytes", min=1024, help="Maximum request body, in bytes.")
]
AudioOption = Annotated[
    float, typer.Option("--max-audio", min=0.1, help="Maximum length of a recording, in seconds.")
]
TokensOption = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Maximum length of an answer, in tokens.")
]
DeadlineOption = Annotated[
    float,
    typer.Option("--deadline", min=0.1, help="Time limit of a request, in seconds."),
]
CacheOption = Annotated[
    int,
    typer.Option(
        "--cached-embeddings",
        min=0,
        help="Number of audio embeddings kept for further questions; 0 keeps none.",
    ),
]
DrainOption = Annotated[
    float,
    typer.Option("--drain", min=0, help="Time to finish running requests at shutdown, in seconds."),
]
KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--api-keys",
        help=f"File of accepted API keys, one per line (default: the variable {KEYS}).",
    ),
]
FetchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fetch-from",
        metavar="HOST[:PORT]",
        help="Host allowed in audio_url; may be repeated (default: none).",
    ),
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        metavar="ORIGIN",
        help="Web origin whose pages may send requests (default: none); may be repeated.",
    ),
]
ReplicasOption = Annotated[
    int, typer.Option("--replicas", min=1, help="Number of model replicas; needs --ray.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=1, help="CPU threads of each replica; needs --ray.")
]


def serve(
    spec: SpecOption = "",
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    name: NameOption = "",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    max_batch_size: BatchOption = 16,
    max_waiting: WaitingOption = 64,
    max_bytes: BytesOption = 32 * 2**20,
    max_audio: AudioOption = 600.0,
    max_tokens: TokensOption = 1024,
    deadline: DeadlineOption = 300.0,
    cached_embeddings: CacheOption = 8192,
    drain: DrainOption = 30.0,
    api_keys: KeysOption = None,
    fetch_from: FetchOption = None,
    allow_origin: OriginOption = None,
    ray: RayOption = None,
    replicas: ReplicasOption = 1,
    threads: ThreadsOption = 1,
    gpus: GpusOption = 0.0,
) -> None:
    """Serve a model in OpenAI's protocol: chat completions and transcriptions."""
    _check_libraries()
    from diffa.serving.limits import Limits
    from diffa.serving.ray_serve import Deployment, ReplicaConfig

    if ray is None and (replicas, threads, gpus) != (1, 1, 0.0):
        raise SpecError("--replicas, --threads and --gpus need --ray: an address, auto or local")
    if ray is not None and not port:
        raise SpecError("--ray needs a --port: its proxies cannot choose one")
    keys, spec = read_keys(api_keys), spec or default_spec()
    limits = Limits(
        max_batch_size=max_batch_size, max_waiting=max_waiting, max_body_bytes=max_bytes,
        max_audio_seconds=max_audio, max_tokens=max_tokens, deadline=deadline,
        cached_embeddings=cached_embeddings, drain_timeout=drain,
    )  # fmt: skip
    load: Callable[[], Model]
    if ray is None:
        load = partial(_load, spec, overrides, sampler_preset, device, dtype)
    else:  # the replicas' machines may have other devices than this one
        place = ("cuda" if gpus else "cpu") if device == "auto" else device
        load = model_source(spec, overrides, sampler_preset, place, dtype).load
    hosts = [entry.lower() for entry in fetch_from or ()]
    origins = [check_origin(origin) for origin in allow_origin or ()]
    deployment = Deployment(load, name or Path(spec).stem, limits, keys, hosts, origins)
    if not keys and not _is_loopback(host):
        print_note(
            f"WARNING: --host {host} without API keys: everyone who reaches this address can use "
            f"the model; set {KEYS} or --api-keys"
        )
    _run(deployment, host, port, ray, ReplicaConfig(replicas, threads, gpus))


def _run(
    deployment: Deployment, host: str, port: int, ray: str | None, replicas: ReplicaConfig
) -> None:
    """Serve in this process, or on a Ray cluster, until a signal arrives."""
    from diffa.serving import ray_serve
    from diffa.serving import run as local

    access = f"{'with' if deployment.api_keys else 'without'} API keys"
    if ray is not None:
        count = f"{replicas.num_replicas} replicas"
        note = f"{deployment.name} at http://{host}:{port}/v1, {access}, {count}"
        ray_serve.run_on_ray(deployment, host, port, ray, replicas, lambda: print_note(note))
        return
    socket = local.bind_socket(host, port)  # before a model is loaded in vain
    service = deployment.create_service()
    print_note(f"{deployment.name} at http://{host}:{socket.getsockname()[1]}/v1, {access}")
    local.run_server(service, socket)


def read_keys(path: Path | None) -> list[str]:
    """Read API keys from a file (one per line) or the environment (separated by commas).

    Raises:
        SpecError: The file cannot be read or is empty, or the variable is set to nothing.
    """
    if path is None:
        text = os.environ.get(KEYS)
        keys = [key.strip() for key in (text or "").split(",") if key.strip()]
        if text is not None and not keys:
            raise SpecError(f"{KEYS} is set but holds no key: set one, or unset it to need none")
        return keys
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--api-keys {path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise SpecError(f"--api-keys {path} holds no key")
    return keys


def check_origin(origin: str) -> str:
    """Return a web origin (``https://host[:port]``, or ``*``); SpecError for anything else."""
    parts = urlsplit(origin)
    if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
        raise SpecError(f"--allow-origin {origin!r} is no origin such as https://example.org")
    return origin


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _load(
    spec: str, overrides: list[str] | None, sampler_preset: str, device: str, dtype: str | None
) -> Model:
    return load_model(spec, overrides, sampler_preset, device, dtype)[0]


def _check_libraries() -> None:
    """Name the missing extra before a model is loaded."""
    for library in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
        try:
            importlib.import_module(library)
        except ImportError as error:
            hint = "pip install 'diffa-audio[serve]'"
            raise SpecError(f"diffa serve needs {library}: {hint}") from error
