"""ASGI middleware: authentication, limits by headers, slow and large bodies, metrics."""

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
_PATHS = ("/v1/chat/completions", "/v1/audio/transcriptions", "/v1/models")


class RequestLimits:
    """ASGI middleware that refuses requests under ``/v1/`` before their bodies are parsed."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request, and count it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        service, begin = self._service, time.monotonic()
        scope["diffa.arrived"] = begin
        status = 499  # unless a response starts, the client has disconnected

        async def send_counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        error = self._check_headers(scope)
        if error is not None:
            await _send_error(error, send_counted)
        else:
            # Only the event loop's thread changes the number: no lock is needed.
            service.num_inflight += 1
            try:
                await self._app(scope, BoundedBody(receive, service).receive, send_counted)
            finally:
                service.num_inflight -= 1
        # Unknown paths share a label: clients must not be able to create new time series.
        path = next((known for known in _PATHS if scope["path"].startswith(known)), "other")
        service.metrics.http_requests.labels(path, str(status)).inc()
        service.metrics.http_seconds.labels(path).observe(time.monotonic() - begin)

    def _check_headers(self, scope: Scope) -> RequestError | None:
        """Return why a request is refused by its headers alone, or None."""
        service, limits = self._service, self._service.limits
        headers = {key.lower(): value for key, value in scope["headers"]}
        if service.draining:
            return shutting_down()
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and not {origin, "*"} & set(service.allowed_origins):
            # A page of any site can send text/plain and forms to a server on its visitor's machine.
            message = f"pages of {origin[:200]!r} may not use this server (--allow-origin)"
            return RequestError(403, message, code="origin_not_allowed")
        if service.api_keys and not self._has_valid_key(headers.get(b"authorization", b"")):
            return RequestError(401, "a valid API key is needed: 'Authorization: Bearer KEY'")
        if service.num_inflight >= limits.max_connections:
            return RequestError(429, "too many connections", code="queue_full", retry_after=1)
        if len(scope["headers"]) > limits.max_headers:
            return RequestError(431, f"a request may have {limits.max_headers} headers at most")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return RequestError(415, "send the body without Content-Encoding")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return bad_request("Content-Length must be a number")
        if len(length) > 18 or int(length) > limits.max_body_bytes:
            return too_large(f"a body may have {limits.max_body_bytes} bytes at most")
        return None

    def _has_valid_key(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        # All keys are compared, in constant time: the duration must not tell which one is close.
        equal = [hmac.compare_digest(key.strip(), k.encode()) for k in self._service.api_keys]
        return scheme.lower() == b"bearer" and any(equal)


class BoundedBody:
    """Receive one body within the limits on bytes and seconds, whatever its headers say."""

    def __init__(self, receive: Receive, service: Service) -> None:
        self._receive, self._limits = receive, service.limits
        self._bytes_left, self._complete = service.limits.max_body_bytes, False
        limits = service.limits
        self._until = time.monotonic() + min(limits.body_timeout, limits.deadline)

    async def receive(self) -> Any:
        """Return the next ASGI message.

        Raises:
            RequestError: too many bytes (413), or too late (408).
        """
        if self._complete:  # then the next message is the disconnect, which may take hours
            return await self._receive()
        try:
            timeout = max(0.0, self._until - time.monotonic())
            message = await asyncio.wait_for(self._receive(), timeout)
        except TimeoutError as error:
            seconds = self._limits.body_timeout
            raise RequestError(408, f"the body did not arrive within {seconds:g} s") from error
        if message["type"] == "http.request":
            self._bytes_left -= len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._bytes_left < 0:
                raise too_large(f"a body may have {self._limits.max_body_bytes} bytes at most")
        return message


async def _send_error(error: RequestError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    headers |= error.headers()
    pairs = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
