"""Connections of clients: bounded in number, and their headers in bytes and seconds."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffa.serving.limits import Limits

_log = logging.getLogger(__name__)
_log.setLevel(logging.ERROR)  # a line per malformed request would let one client fill the disk


class BoundedConnection(H11Protocol):  # type: ignore[misc]  # uvicorn is optional: mypy skips it
    """Uvicorn's connection, closed unless each header arrives in time.

    h11 rather than httptools: httptools collects headers without a limit, before any code of the
    application runs, and therefore also from clients without a key.
    """

    limits = Limits()
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Refuse a connection too many, or begin to wait for its first header."""
        super().connection_made(transport)
        self.logger = _log
        if len(self.connections) > 2 * self.limits.max_connections:
            transport.close()
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the header that was waited for."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data; the time for a header counts from its first byte."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._watch_header()
        else:
            self._stop_timer()

    def _watch_header(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.header_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection_class(limits: Limits) -> type[BoundedConnection]:
    """Return the class that uvicorn makes connections of."""
    return type("Connection", (BoundedConnection,), {"limits": limits})
