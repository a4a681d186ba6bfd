"""Run a server until SIGTERM or SIGINT, and drain it."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from diffa.errors import DiffaError, SpecError
from diffa.serving.app import create_app
from diffa.serving.connection import connection_class
from diffa.serving.service import Service

_LAST_ANSWERS = 5.0  # seconds in which a failed engine's requests are answered with 503


class DrainingServer(uvicorn.Server):  # type: ignore[misc]  # uvicorn is optional: mypy skips it
    """Uvicorn, except that the first signal drains: running requests finish, new ones get 503.

    A second signal ends it at once, and so do ``limits.drain_timeout`` seconds.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._drain_until = service, float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._drain_until = time.monotonic() + self._service.limits.drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second, stop if nothing is left to finish or the time is over."""
        if self._service.engine.failed and not self._service.draining:
            self._service.draining = True
            self._drain_until = time.monotonic() + _LAST_ANSWERS
        if self._service.draining:
            overdue = time.monotonic() > self._drain_until
            if overdue:  # close() joins threads, which must not block the event loop
                await asyncio.to_thread(self._service.engine.close)
            if overdue or not self._service.num_inflight:
                self.should_exit = True
        return bool(await super().on_tick(counter))


def create_server(service: Service, host: str, port: int, **options: Any) -> DrainingServer:
    """Return the server of a service; call its ``run()``, or await its ``serve()``."""
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=2,
        timeout_keep_alive=15,
        http=connection_class(service.limits),
        h11_max_incomplete_event_size=service.limits.max_header_bytes,
        **options,
    )
    return DrainingServer(config, service)


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind an address (any free port if 0); connections are refused until ``run_server``.

    Raises:
        SpecError: the address belongs to no interface of this machine, or is taken.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise SpecError(f"cannot listen on {host}:{port}: {error}") from error
    return bound


def run_server(service: Service, bound: socket.socket) -> None:
    """Serve at a bound socket until SIGTERM or SIGINT.

    Raises:
        DiffaError: the engine has failed; a supervisor may start the server again.
    """
    logging.getLogger("diffa.serving").setLevel(logging.INFO)
    host, port = bound.getsockname()[:2]
    create_server(service, host, port).run(sockets=[bound])
    if service.engine.failed:
        raise DiffaError("the server ends: its workers end with errors as soon as they begin")
