"""The server as an application of Ray Serve: several replicas of a model behind Ray's proxies."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import torch

from diffa.errors import DiffaError, SpecError
from diffa.runtime.threads import single_core
from diffa.serving.app import create_app
from diffa.serving.limits import Limits
from diffa.serving.middleware import Receive, Scope, Send
from diffa.serving.service import Service

HEADER = b"x-replica"
_ERROR = re.compile(r"^[\w.]+(?:Error|Exception)\b", re.MULTILINE)


class Replicas(NamedTuple):
    """How many replicas there are, and the CPU threads and GPUs that each one takes."""

    number: int = 1
    threads: int = 1
    gpus: float = 0.0


class Served(NamedTuple):
    """What is served, before its model is loaded: it can travel to other processes.

    Attributes:
        load: gives the model.
        name: what clients call it.
        limits: what is taken, by each replica.
        keys: API keys; none are needed where empty.
        hosts: from which recordings may be fetched.
    """

    load: Callable[[], Any]
    name: str
    limits: Limits
    keys: Sequence[str]
    hosts: Sequence[str]

    def service(self) -> Service:
        """Load the model and start its engine."""
        more: Any = {"limits": self.limits, "keys": self.keys, "hosts": self.hosts}
        with single_core():  # the engine answers in threads of its own
            model = self.load()
        return Service(model, self.name, **more)


class Signed:
    """ASGI middleware that says in ``X-Replica`` which replica has answered."""

    def __init__(self, app: Any, replica: str) -> None:
        self._app, self._header = app, (HEADER, replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def signed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._app(scope, receive, signed)


def serve(
    served: Served,
    host: str,
    port: int,
    address: str,
    replicas: Replicas,
    on_ready: Callable[[], None],
) -> None:
    """Serve on the Ray cluster at ``address`` until SIGTERM or SIGINT, then let requests finish.

    A second signal ends at once. Other applications of the cluster are left alone.

    Raises:
        SpecError: Ray is not installed, there is no cluster at the address, it serves this name
            already, or it has too little for the replicas.
        DiffaError: the application does not start.
    """
    ray, api = _connected(address)
    name = f"diffa-{served.name}"
    try:
        _check(ray, api, name, address, replicas)
        try:
            _deploy(api, name, application(served, replicas), host, port)
            told = _signals()
            on_ready()
            told.wait()
        finally:
            _end(api, name, address)
    finally:
        ray.shutdown()


def application(served: Served, replicas: Replicas) -> Any:
    """What Ray Serve runs: each replica loads the model and has an engine of its own."""
    api: Any = import_module("ray.serve")
    own: list[Service] = []  # filled in the replica

    def build() -> Any:
        torch.set_num_threads(replicas.threads)
        own.append(served.service())
        app = create_app(own[0])
        app.add_middleware(Signed, replica=api.get_replica_context().replica_id.unique_id)
        return app

    class Replica:
        def check_health(self) -> None:
            """Tell Ray of an engine that has died: it starts another replica."""
            if not own[0].engine.alive:
                raise DiffaError("the engine has ended")

    options = {
        # more than the gate lets in: it refuses the rest with 429, where Ray would let them wait
        "max_ongoing_requests": 2 * served.limits.connections,
        "max_constructor_retry_count": 1,
        "graceful_shutdown_timeout_s": served.limits.drain,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_cpus": replicas.threads, "num_gpus": replicas.gpus},
    }
    wrapped = api.ingress(build)(Replica)
    return api.deployment(wrapped, num_replicas=replicas.number, **options).bind()


def _connected(address: str) -> tuple[Any, Any]:
    """Ray and Ray Serve, connected to the cluster; ``local`` starts one that ends with us."""
    try:
        ray: Any = import_module("ray")
        api: Any = import_module("ray.serve")
    except ImportError as error:
        raise SpecError(
            "diffa serve --ray needs Ray Serve: pip install 'diffa-audio[ray]'"
        ) from error
    more = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, **more)
    except Exception as error:  # a bare one where a node takes too long to start
        raise SpecError(f"--ray {address}: {error}") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return ray, api


def _check(ray: Any, api: Any, name: str, address: str, replicas: Replicas) -> None:
    """Refuse what would replace another's application, or wait for ever."""
    if name in api.status().applications:
        raise SpecError(f"--ray {address} serves {name} already: stop that one first")
    if address != "local":  # a cluster may grow
        return
    there = ray.cluster_resources()
    for what, each in {"CPU": replicas.threads, "GPU": replicas.gpus}.items():
        asked, had = each * replicas.number, there.get(what, 0.0)
        if asked > had:
            raise SpecError(f"{replicas.number} replicas need {asked:g} {what}s: there are {had:g}")


def _deploy(api: Any, name: str, made: Any, host: str, port: int) -> None:
    """Start the application, and wait until all its replicas have loaded their model."""
    try:
        api.start(http_options={"host": host, "port": port})
        api.run(made, name=name, route_prefix="/")
    except Exception as error:  # Ray raises several types, with long texts
        found = api.status().applications.get(name)
        said = [one.message for one in found.deployments.values()] if found else []
        raise DiffaError(f"{name} does not start: {_reason([*said, str(error)])}") from error


def _reason(messages: Sequence[str]) -> str:
    """What the first message that there is ends in: the error under a traceback, with its notes."""
    text = next((message for message in messages if message.strip()), "Ray does not say why")
    found = [match.start() for match in _ERROR.finditer(text)]
    return text[found[-1] if found else 0 :].strip()


def _signals() -> threading.Event:
    """What the first SIGTERM or SIGINT sets; a second one ends the process."""
    told = threading.Event()

    def tell(number: int, frame: Any) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.default_int_handler)
        told.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, tell)
    return told


def _end(api: Any, name: str, address: str) -> None:
    """Delete the application once its requests have finished; Serve too where it has no other."""
    while name in api.status().applications:
        with suppress(TimeoutError):  # it waits for a minute at most
            api.delete(name)
    if address != "local" and not api.status().applications:  # a local one ends with Ray
        api.shutdown()
