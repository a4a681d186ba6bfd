"""What a request must pass before it is read: keys, sizes, slow bodies, and a door that closes."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from diffa.serving.errors import RequestError, bad_request, shutting_down, too_large
from diffa.serving.service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
PATHS = ("/v1/chat/completions", "/v1/audio/transcriptions", "/v1/models")


class Gate:
    """ASGI middleware around the application; everything under ``/v1/`` passes through it."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        service, begun, status = self._service, time.perf_counter(), [499]

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        refused = self._check(scope)
        if refused is not None:
            await respond(refused, watched)
        else:
            service.inflight += 1
            try:
                await self._app(scope, Body(receive, service).receive, watched)
            finally:
                service.inflight -= 1
        path = next((known for known in PATHS if scope["path"].startswith(known)), "other")
        service.metrics.requests.labels(path, str(status[0])).inc()
        service.metrics.seconds.labels(path).observe(time.perf_counter() - begun)

    def _check(self, scope: Scope) -> RequestError | None:
        """What is wrong with a request by its headers alone."""
        service, limits = self._service, self._service.limits
        headers = {key.lower(): value for key, value in scope["headers"]}
        if service.draining:
            return shutting_down()
        if service.keys and not self._known(headers.get(b"authorization", b"")):
            return RequestError(401, "a valid API key is needed: 'Authorization: Bearer KEY'")
        if service.inflight >= limits.connections:
            return RequestError(429, "too many connections", code="queue_full", retry_after=1)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return RequestError(415, "a body must be sent as it is, without Content-Encoding")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return bad_request("Content-Length must be a number")
        if len(length) > 18 or int(length) > limits.bytes:
            return too_large(f"a body can have {limits.bytes} bytes at most")
        return None

    def _known(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        right = [hmac.compare_digest(key.strip(), k.encode()) for k in self._service.keys]
        return scheme.lower() == b"bearer" and any(right)


class Body:
    """Receives one body: not more bytes than are taken, and not more slowly than is bearable."""

    def __init__(self, receive: Receive, service: Service) -> None:
        self._receive, self._limits = receive, service.limits
        self._left, self._done = service.limits.bytes, False
        self._until = time.monotonic() + service.limits.body_seconds

    async def receive(self) -> Any:
        """The next message.

        Raises:
            Refusal: too many bytes (413), or too late (408).
        """
        if self._done:
            return await self._receive()
        try:
            wait = max(0.0, self._until - time.monotonic())
            message = await asyncio.wait_for(self._receive(), wait)
        except TimeoutError as error:
            seconds = self._limits.body_seconds
            raise RequestError(408, f"the body did not arrive within {seconds:g} s") from error
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._done = not message.get("more_body", False)
            if self._left < 0:
                raise too_large(f"a body can have {self._limits.bytes} bytes at most")
        return message


async def respond(refused: RequestError, send: Send) -> None:
    """Send a refusal as JSON."""
    body = json.dumps(refused.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    headers |= refused.headers()
    pairs = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
