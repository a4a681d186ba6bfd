"""Recordings at other addresses: fetched only from hosts that the operator has listed."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from diffa.serving.errors import bad_request, too_large
from diffa.serving.limits import Limits

_SECONDS = 10.0


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it could lead to a host that is not listed."""

    def redirect_request(self, *args: Any) -> None:
        """Refuse."""


def download_recording(url: object, hosts: Sequence[str], limits: Limits, param: str) -> bytes:
    """Bytes at an ``http`` or ``https`` address whose ``host`` or ``host:port`` is in ``hosts``.

    Raises:
        Refusal: the host is not listed, does not answer, or sends too much.
    """
    if not isinstance(url, str):
        raise bad_request(f"{param} must be text, got {type(url).__name__}", param)
    try:
        parts = urlsplit(url)
        place = parts.netloc.lower()
    except ValueError as error:
        raise bad_request(f"{param} is not an address: {error}", param) from error
    if parts.scheme not in ("http", "https"):
        raise bad_request(f"{param} must be a data URI, or http(s) from a listed host", param)
    if place not in hosts:
        raise bad_request(
            f"{param}: this server does not fetch from {place or 'there'}; send the recording "
            "itself as input_audio, or as a data URI",
            param,
            code="remote_not_allowed",
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())
    try:
        with opener.open(url, timeout=_SECONDS) as reply:
            data: bytes = reply.read(limits.bytes + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise bad_request(f"{param} cannot be fetched: {error}", param) from error
    if len(data) > limits.bytes:
        raise too_large(f"{param} holds more than {limits.bytes} bytes", param)
    return data
