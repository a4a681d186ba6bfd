"""Download recordings by URL, only from hosts that the operator allows."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlsplit

from diffa.serving.errors import RequestError, bad_request, too_large
from diffa.serving.limits import Limits

_SILENCE = 10.0  # seconds without a byte
_GRACE = 3.0  # seconds after which the rate counts
_PIECE = 1 << 16


class RemoteRecording(NamedTuple):
    """A recording that is still to be downloaded.

    Attributes:
        url: http or https, at an allowed host.
        param: name of the field that holds the URL.
    """

    url: str
    param: str


def check_url(url: str, allowed_hosts: Sequence[str], param: str) -> RemoteRecording:
    """Return an http(s) URL whose ``host`` or ``host:port`` is allowed; raises RequestError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.netloc.lower(), parts.port
    except ValueError as error:
        raise bad_request(f"{param} is not a URL: {error}", param) from error
    if parts.scheme not in ("http", "https"):
        raise bad_request(f"{param} must be a data URI, or http(s) at an allowed host", param)
    if host not in allowed_hosts:
        raise bad_request(
            f"{param}: this server does not download from {host or 'there'}; send the recording "
            "itself as input_audio, or as a data URI",
            param,
            code="remote_not_allowed",
        )
    return RemoteRecording(url, param)


def download_recording(remote: RemoteRecording, limits: Limits) -> bytes:
    """Return the bytes at a URL, within the limits on bytes, time and rate.

    Proxies of the environment are not used (they would hide the host that is asked), and no
    redirect is followed (it could lead to a host that is not allowed).

    Raises:
        RequestError: the host does not answer, is too slow (400), or sends too much (413).
    """
    url, param = remote
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    timeout = min(_SILENCE, limits.download_timeout)
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    # A socket's timeout is for one byte: the timer bounds everything, a dripped header as well.
    stopped = threading.Event()
    timer = threading.Timer(limits.download_timeout, _stop, (connection, stopped))
    timer.daemon = True
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status != 200:
            raise bad_request(f"{param}: the host answers {response.status}", param)
        data = _read_body(response, limits, param)
        if stopped.is_set():
            raise OSError("timed out")
        return data
    except (http.client.HTTPException, OSError, ValueError) as error:
        if stopped.is_set():
            raise _too_slow(param, f"not within {limits.download_timeout:g} s") from error
        raise bad_request(f"{param} cannot be downloaded: {error}", param) from error
    finally:
        timer.cancel()
        connection.close()


def _read_body(response: http.client.HTTPResponse, limits: Limits, param: str) -> bytes:
    begin, data = time.monotonic(), bytearray()
    while piece := response.read1(_PIECE):
        data += piece
        if len(data) > limits.max_body_bytes:
            raise too_large(f"{param} holds more than {limits.max_body_bytes} bytes", param)
        seconds = time.monotonic() - begin
        if seconds > _GRACE and len(data) < limits.min_download_rate * seconds:
            raise _too_slow(param, f"below {limits.min_download_rate:g} bytes per second")
    if response.length:
        raise http.client.IncompleteRead(bytes(data[:0]), response.length)
    return bytes(data)


def _too_slow(param: str, how: str) -> RequestError:
    message = f"{param} is downloaded too slowly ({how}): send the recording itself"
    return bad_request(message, param, "download_too_slow")


def _stop(connection: http.client.HTTPConnection, stopped: threading.Event) -> None:
    stopped.set()
    with suppress(OSError, AttributeError):  # it may have no socket yet, or none any more
        connection.sock.shutdown(socket.SHUT_RDWR)
