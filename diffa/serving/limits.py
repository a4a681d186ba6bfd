"""Limits of a server: sizes, seconds, tokens and concurrent requests."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What a server accepts.

    Attributes:
        max_batch_size: requests decoded at the same time.
        max_waiting: requests that wait for a place in the batch; more get 429.
        max_connections: requests whose bodies are read at the same time; more get 429.
        max_body_bytes: bytes of a request's body.
        max_text_chars: characters of a question, and of a system prompt.
        max_audio_seconds: seconds of a recording.
        max_tokens: tokens of an answer.
        deadline: seconds from a request's arrival to the end of its answer.
        body_timeout: seconds until a request's body must have arrived.
        header_timeout: seconds from the first byte of a request's header to its last.
        max_header_bytes: bytes of a request's header.
        max_headers: lines of a request's header.
        download_timeout: seconds that the download of a recording may take.
        min_download_rate: bytes per second below which a download is given up.
        cached_embeddings: audio embeddings kept for further questions about a recording. A second
            of audio is about 12; 1,000 of an 8B model take 16 MiB in float32.
        drain_timeout: seconds that running requests may take at shutdown.
    """

    max_batch_size: int = 16
    max_waiting: int = 64
    max_connections: int = 256
    max_body_bytes: int = 32 * 2**20
    max_text_chars: int = 32768
    max_audio_seconds: float = 600.0
    max_tokens: int = 1024
    deadline: float = 300.0
    body_timeout: float = 30.0
    header_timeout: float = 10.0
    max_header_bytes: int = 32 * 2**10
    max_headers: int = 100
    download_timeout: float = 30.0
    min_download_rate: float = 16 * 2**10
    cached_embeddings: int = 8192
    drain_timeout: float = 30.0
