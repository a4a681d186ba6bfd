"""The server as an application of Ray Serve: several replicas of a model behind Ray's proxies."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from diffa.errors import DiffaError, SpecError
from diffa.runtime.ray import connect
from diffa.runtime.threads import single_core
from diffa.serving.app import create_app
from diffa.serving.limits import Limits
from diffa.serving.middleware import Receive, Scope, Send
from diffa.serving.service import Service

if TYPE_CHECKING:
    from diffa.model import Model

_HEADER = b"x-replica"
_ERROR = re.compile(r"^[\w.]+(?:Error|Exception)\b", re.MULTILINE)


class ReplicaConfig(NamedTuple):
    """How many replicas there are, and the CPUs and GPUs that each one takes."""

    num_replicas: int = 1
    num_cpus: int = 1
    num_gpus: float = 0.0


class Deployment(NamedTuple):
    """What is served, before its model is loaded; it is sent to other processes.

    Attributes:
        load_model: returns the model; called in each replica.
        name: the model's name for clients.
        limits: what each replica accepts.
        api_keys: keys that are accepted. Empty: none is needed.
        allowed_hosts: from which recordings may be downloaded.
        allowed_origins: web origins whose pages may send requests.
    """

    load_model: Callable[[], Model]
    name: str
    limits: Limits
    api_keys: Sequence[str]
    allowed_hosts: Sequence[str]
    allowed_origins: Sequence[str] = ()

    def create_service(self) -> Service:
        """Load the model and start its engine."""
        with single_core():  # the engine's workers have thread teams; this thread needs none
            model = self.load_model()
        return Service(
            model,
            self.name,
            limits=self.limits,
            api_keys=self.api_keys,
            allowed_hosts=self.allowed_hosts,
            allowed_origins=self.allowed_origins,
        )


class ReplicaHeader:
    """ASGI middleware that names the replica in ``X-Replica``."""

    def __init__(self, app: Any, replica: str) -> None:
        self._app, self._header = app, (_HEADER, replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_header(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._app(scope, receive, send_with_header)


def run_on_ray(
    deployment: Deployment,
    host: str,
    port: int,
    address: str,
    replicas: ReplicaConfig,
    on_ready: Callable[[], None],
) -> None:
    """Serve on the Ray cluster at ``address`` until SIGTERM or SIGINT, then let requests finish.

    A second signal ends it at once. Other applications of the cluster are not touched.

    Raises:
        SpecError: Ray is not installed, there is no cluster at the address, it serves this name
            already, or it has too few CPUs or GPUs.
        DiffaError: the application does not start.
    """
    ray, api = _connect(address)
    name = f"diffa-{deployment.name}"
    try:
        _check_cluster(ray, api, name, address, replicas)
        try:
            _deploy(api, name, create_application(deployment, replicas), host, port)
            stop = _catch_signals()
            on_ready()
            stop.wait()
        finally:
            _delete(api, name, address)
    finally:
        ray.shutdown()


def create_application(deployment: Deployment, replicas: ReplicaConfig) -> Any:
    """Return the Ray Serve application: each replica loads the model and has its own engine."""
    api: Any = import_module("ray.serve")
    services: list[Service] = []  # one, in the replica's process

    def build() -> Any:
        torch.set_num_threads(replicas.num_cpus)
        services.append(deployment.create_service())
        app = create_app(services[0])
        app.add_middleware(ReplicaHeader, replica=api.get_replica_context().replica_id.unique_id)
        return app

    class Replica:
        def check_health(self) -> None:
            """Report a dead engine to Ray, which starts another replica."""
            if not services[0].engine.alive:
                raise DiffaError("the engine has ended")

    options = {
        # More than the middleware accepts: it answers 429, where Ray would let requests wait.
        "max_ongoing_requests": 2 * deployment.limits.max_connections,
        "max_constructor_retry_count": 1,
        "graceful_shutdown_timeout_s": deployment.limits.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
    }
    replica = api.ingress(build)(Replica)
    return api.deployment(replica, num_replicas=replicas.num_replicas, **options).bind()


def _connect(address: str) -> tuple[Any, Any]:
    """Connect to the cluster (``local`` starts one) and return the modules of Ray and Ray Serve."""
    options = {"include_dashboard": False} if address == "local" else {}
    ray = connect(address, "diffa serve", **options)
    api: Any = import_module("ray.serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return ray, api


def _check_cluster(ray: Any, api: Any, name: str, address: str, replicas: ReplicaConfig) -> None:
    """Refuse to replace an application, or to wait for CPUs that a local cluster never gets."""
    if name in api.status().applications:
        raise SpecError(f"--ray {address} serves {name} already: stop that one first")
    if address != "local":  # a cluster may grow
        return
    resources = ray.cluster_resources()
    for kind, each in {"CPU": replicas.num_cpus, "GPU": replicas.num_gpus}.items():
        needed, there = each * replicas.num_replicas, resources.get(kind, 0.0)
        if needed > there:
            count = replicas.num_replicas
            raise SpecError(f"{count} replicas need {needed:g} {kind}s: there are {there:g}")


def _deploy(api: Any, name: str, application: Any, host: str, port: int) -> None:
    """Start the application, and wait until all its replicas have loaded their model."""
    try:
        api.start(http_options={"host": host, "port": port})
        api.run(application, name=name, route_prefix="/")
    except Exception as error:  # Ray raises several types, with long texts
        status = api.status().applications.get(name)
        messages = [one.message for one in status.deployments.values()] if status else []
        reason = _last_error([*messages, str(error)])
        raise DiffaError(f"{name} does not start: {reason}") from error


def _last_error(messages: Sequence[str]) -> str:
    """Return the error at the end of the first traceback, with its notes."""
    text = next((message for message in messages if message.strip()), "Ray does not say why")
    starts = [match.start() for match in _ERROR.finditer(text)]
    return text[starts[-1] if starts else 0 :].strip()


def _catch_signals() -> threading.Event:
    """Return what the first SIGTERM or SIGINT sets; a second one ends the process."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.default_int_handler)
        stop.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, on_signal)
    return stop


def _delete(api: Any, name: str, address: str) -> None:
    """Delete the application once its requests have finished; Serve too, if it has no other."""
    while name in api.status().applications:
        with suppress(TimeoutError):  # Ray waits for a minute at most
            api.delete(name)
    if address != "local" and not api.status().applications:  # a local Serve ends with Ray
        api.shutdown()
