"""Errors of the server: HTTP statuses in the shape that OpenAI's clients expect."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import BaseModel

from diffa.errors import AudioError, DiffaError, SpecError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(DiffaError):
    """A request that is refused: HTTP status, message, and the parameter at fault."""

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
        """Return OpenAI's error object."""
        return error_body(self.status, str(self), param=self.param, code=self.code)

    def headers(self) -> dict[str, str]:
        """Return ``Retry-After``, and ``Connection: close`` if the body was not read."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "Connection": "close"} if self.status in (408, 413, 503) else headers


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object; text that is not valid Unicode is escaped."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    message = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """Return the error of a malformed request, 400."""
    return RequestError(400, message, param=param, code=code)


def too_large(message: str, param: str | None = None) -> RequestError:
    """Return the error of a request beyond the server's limits, 413."""
    return RequestError(413, message, param=param, code="too_large")


def queue_full(message: str, retry_after: int) -> RequestError:
    """Return the error of a full queue, 429."""
    return RequestError(429, message, code="queue_full", retry_after=retry_after)


def shutting_down() -> RequestError:
    """Return the error of a server that is shutting down, 503."""
    return RequestError(503, "the server is shutting down: ask another one", retry_after=5)


def deadline_exceeded(seconds: float) -> RequestError:
    """Return the error of an answer that is not finished in time, 504."""
    message = f"no answer within the deadline of {seconds:g} s"
    return RequestError(504, message, code="deadline_exceeded")


def engine_failed() -> RequestError:
    """Return the error of a server whose workers cannot be replaced, 503."""
    return RequestError(503, "the server's engine has ended: ask another one", retry_after=5)


def as_exception(error: BaseException) -> Exception:
    """Return what a request may fail with: SystemExit, say, would end who raises it again."""
    if isinstance(error, Exception):
        return error
    return DiffaError(f"{type(error).__name__} while answering")


def public_error(error: Exception) -> Exception:
    """Return what a client may know of an engine's error: the request's faults are 400, others
    500; errors that are not diffa's stay as they are and become a message without details."""
    if isinstance(error, AudioError | SpecError):
        return bad_request(str(error))
    if isinstance(error, RequestError) or not isinstance(error, DiffaError):
        return error
    return RequestError(500, str(error))


def log_error(log: logging.Logger, what: str, error: BaseException) -> None:
    """Log an error that becomes a response: one line if a user can fix it, else its traceback."""
    if isinstance(error, DiffaError):
        log.warning("%s: %s", what, error)
    else:
        log.error("%s: %s", what, type(error).__name__, exc_info=error)
