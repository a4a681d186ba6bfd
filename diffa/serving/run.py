"""Run the server until it is told to stop, and let it finish what it has begun."""

from __future__ import annotations

import logging
import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from diffa.errors import SpecError
from diffa.serving.app import create_app
from diffa.serving.service import Service


class Server(uvicorn.Server):  # type: ignore[misc]  # uvicorn is optional: mypy skips it
    """Uvicorn, except that the first signal drains: requests in flight finish, new ones get 503.

    A second signal ends at once, and so does the end of ``limits.drain`` seconds.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._until = service, float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._until = time.monotonic() + self._service.limits.drain

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: stop once nothing is left to finish, or it is too late."""
        if self._service.draining:
            overdue = time.monotonic() > self._until
            if overdue:
                await self._service.hand(self._service.engine.close)
            if overdue or not self._service.inflight:
                self.should_exit = True
        return bool(await super().on_tick(counter))


def configured(service: Service, host: str, port: int, **more: Any) -> Server:
    """The server of a service; ``run()`` it, or await ``serve()``."""
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=2,
        timeout_keep_alive=15,
        **more,
    )
    return Server(config, service)


def bind(host: str, port: int) -> socket.socket:
    """Take an address, any free port where 0; connections are refused until ``serve`` listens.

    Raises:
        SpecError: the address is no one's here, or taken.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise SpecError(f"cannot listen on {host}:{port}: {error}") from error
    return made


def serve(service: Service, taken: socket.socket) -> None:
    """Serve at an address that ``bind`` has taken, until SIGTERM or SIGINT."""
    logging.getLogger("diffa.serving").setLevel(logging.INFO)
    host, port = taken.getsockname()[:2]
    configured(service, host, port).run(sockets=[taken])
