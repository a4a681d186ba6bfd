"""What the server refuses, with the HTTP status and the shape that OpenAI's clients expect."""

from __future__ import annotations

import logging
from typing import Any

from diffa.errors import DiffaError


class RequestError(DiffaError):
    """A request that is not answered: HTTP status, what is wrong, and the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI words it: message, type, param and code."""
        return error_body(self.status, str(self), param=self.param, code=self.code)

    def headers(self) -> dict[str, str]:
        """``Retry-After`` where waiting helps; a connection whose body was not read is closed."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**found, "Connection": "close"} if self.status in (408, 413, 503) else found


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object; text that is not valid Unicode is escaped."""
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    message = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A malformed request, 400."""
    return RequestError(400, message, param=param, code=code)


def too_large(message: str, param: str | None = None) -> RequestError:
    """More bytes, seconds or tokens than the server takes, 413."""
    return RequestError(413, message, param=param, code="too_large")


def queue_full(message: str, retry_after: int) -> RequestError:
    """The queue is full, 429."""
    return RequestError(429, message, code="queue_full", retry_after=retry_after)


def shutting_down() -> RequestError:
    """The server is shutting down, 503."""
    return RequestError(503, "the server is shutting down: ask another one", retry_after=5)


def deadline_exceeded(seconds: float) -> RequestError:
    """The answer was not ready before the deadline, 504."""
    return RequestError(504, f"no answer within the deadline of {seconds:g} s", code="deadline")


def log_error(log: logging.Logger, what: str, error: Exception) -> None:
    """Log an error that becomes an answer: in a line where a user can mend it, else in full."""
    if isinstance(error, DiffaError):
        log.warning("%s: %s", what, error)
    else:
        log.error("%s: %s", what, type(error).__name__, exc_info=error)
