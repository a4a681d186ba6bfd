"""Client of an OpenAI-compatible chat model, with retries, backoff and a rate limit."""

from __future__ import annotations

import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from diffa.errors import DiffaError, SpecError
from diffa.runtime.text import parse_json, to_unicode

KEY = "OPENAI_API_KEY"
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
_MAX_REPLY = 16 << 20  # bytes
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FOR_ALL = (301, 302, 303, 307, 308, 401, 403, 404, 405)  # no other request would fare better


class ChatError(DiffaError):
    """An endpoint gives no reply."""


class RequestRefused(ChatError):
    """An endpoint refuses a request, and would refuse it again.

    Attributes:
        reason: The server's message, in one line.
        fatal: Whether it would refuse every other request, too.
    """

    def __init__(self, message: str, reason: str, fatal: bool) -> None:
        super().__init__(message)
        self.reason, self.fatal = reason, fatal


class ChatReply(NamedTuple):
    """One reply: its text, stripped and perhaps empty, and why it ends (``stop``, ``length``)."""

    text: str
    reason: str | None


class ChatClient:
    """A model that answers at ``URL/chat/completions``; any number of threads may ask it.

    Args:
        url: up to the version: ``http://localhost:8000/v1``.
        model: as the server names it.
        key: bearer token; the environment's ``OPENAI_API_KEY`` where None. It is never stored.
        attempts: per request, before giving up; only faults that pass are worth another.
        wait: seconds before the second attempt; each further one waits twice as long, or as long
            as the server's ``Retry-After`` says, up to a minute.
        timeout: seconds for one answer.
        per_minute: requests begun per minute at most, of all threads; no limit where None.

    Raises:
        SpecError: the address, the key or a number cannot be right.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        attempts: int = 6,
        wait: float = 1.0,
        timeout: float = 120.0,
        per_minute: float | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise SpecError(f"an endpoint begins with http:// or https://, not {url!r}")
        if attempts < 1 or (per_minute is not None and per_minute <= 0):
            raise SpecError(f"{url}: attempts must be at least 1, and per_minute above 0")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.attempts, self.wait, self.timeout = model, attempts, wait, timeout
        # A line break at its end, as of a key read from a file, would be no header.
        self._key = (os.environ.get(KEY, "") if key is None else key).strip()
        if not (self._key.isascii() and self._key.isprintable()):  # http.client would show it
            raise SpecError(f"{url}: the key ({KEY}) has a character that no header may have")
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        settings: Mapping[str, Any] | None = None,
        cancel: threading.Event | None = None,
    ) -> list[ChatReply]:
        """Return the model's replies to one conversation; there is at least one.

        Args:
            messages: turns with ``role`` and ``content``.
            settings: sent along: ``temperature``, ``max_tokens``, ``n``, ``seed`` ...
            cancel: once it is set nothing more is sent, and waiting calls return [] at once.

        Raises:
            RequestRefused: the endpoint does not take this request, or answers it with something
                that is no chat completion.
            ChatError: it gives no answer in all attempts.
        """
        cancel = threading.Event() if cancel is None else cancel
        body = {"model": self.model, "messages": [dict(turn) for turn in messages]}
        fault, pause, malformed = "", 0.0, False
        for attempt in range(self.attempts):
            if attempt:
                cancel.wait(min(max(pause, self.wait * 2 ** (attempt - 1)), _LONGEST_WAIT))
            self._take_turn(cancel)
            if cancel.is_set():
                return []
            try:
                return _choices(self._post({**body, **(settings or {})}))
            except urllib.error.HTTPError as error:
                fault, pause, malformed = _server_message(error), _retry_after(error), False
                if error.code not in _PASSING:
                    raise self._refusal(error.code, fault) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", None) or error
                fault, pause = f"{type(error).__name__}: {reason}", 0.0
                malformed = isinstance(error, ValueError)
        message = f"{self.url} gave no answer in {self.attempts} attempts, the last time: {fault}"
        if malformed:  # the fault of this reply alone: other requests go on
            raise RequestRefused(message, fault, fatal=False)
        raise ChatError(f"{message}. Is it running, and is the address right?")

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        target = f"{self.url}/chat/completions"
        request = urllib.request.Request(target, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=self.timeout) as answer:
            data = answer.read(_MAX_REPLY + 1)
        if len(data) > _MAX_REPLY:
            raise ValueError(f"a reply of more than {_MAX_REPLY >> 20} MiB")
        return parse_json(data)

    def _take_turn(self, cancel: threading.Event) -> None:
        """Wait until the rate allows another request."""
        if not self._gap:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._gap
        cancel.wait(start - now)

    def _refusal(self, status: int, reason: str) -> RequestRefused:
        fatal = status in _FOR_ALL
        advice = f". Look at the key ({KEY}), the model's name and the address"
        message = f"{self.url} refuses model {self.model!r}: {reason}"
        return RequestRefused(message + (advice if fatal else ""), reason, fatal)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leave a redirect to the caller: it could take the key to any other host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def _choices(answer: Any) -> list[ChatReply]:
    """Read a chat completion; raises ValueError where it is none."""
    try:
        choices = [
            ChatReply(to_unicode(one["message"]["content"] or "").strip(), one.get("finish_reason"))
            for one in answer["choices"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        content = to_unicode(str(answer)[:200])
        raise ValueError(f"not a chat completion: {content}") from error
    if not choices:
        raise ValueError("a chat completion without choices")
    return choices


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds in a server's Retry-After, or until its date; 0 where it gives neither."""
    header = error.headers.get("Retry-After", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _server_message(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, in one line."""
    if location := error.headers.get("Location", ""):
        return f"{error.code}: it redirects to {location[:200]}; give that address if you trust it"
    try:
        with error:
            text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):  # the status says enough
        text = ""
    try:
        body = parse_json(text)
        body = body.get("error", body)
        text = body.get("message", text) if isinstance(body, dict) else str(body)
    except (ValueError, AttributeError):
        pass
    return f"{error.code} {error.reason}: {' '.join(str(text).split())[:300]}"
