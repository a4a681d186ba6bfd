"""Download recordings by URL, only from hosts that the operator allows."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from diffa.serving.errors import bad_request, too_large
from diffa.serving.limits import Limits

_TIMEOUT = 10.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it could lead to a host that is not allowed."""

    def redirect_request(self, *args: Any) -> None:
        """Refuse the redirect."""


def download_recording(url: str, allowed_hosts: Sequence[str], limits: Limits, param: str) -> bytes:
    """Return the bytes at an http(s) URL whose ``host`` or ``host:port`` is allowed.

    Raises:
        RequestError: the host is not allowed, does not answer (400), or sends too much (413).
    """
    try:
        parts = urlsplit(url)
        host = parts.netloc.lower()
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
    # Proxies of the environment are ignored: they would hide the host that is asked.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    try:
        with opener.open(url, timeout=_TIMEOUT) as response:
            data: bytes = response.read(limits.max_body_bytes + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise bad_request(f"{param} cannot be downloaded: {error}", param) from error
    if len(data) > limits.max_body_bytes:
        raise too_large(f"{param} holds more than {limits.max_body_bytes} bytes", param)
    return data
