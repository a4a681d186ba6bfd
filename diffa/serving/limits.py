"""What a server takes: sizes, seconds, tokens, and how many requests at once."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What a server takes.

    Attributes:
        rows: requests that are answered together.
        waiting: requests that may wait for their turn; more are refused with 429.
        connections: requests whose bodies may be read at the same time; more get 429.
        bytes: of a request's body.
        characters: of a question, and of a system turn.
        audio: seconds of a recording.
        tokens: of an answer.
        deadline: seconds from a request's arrival to the end of its answer.
        body_seconds: until a request's body must have arrived.
        remember: embeddings of recent recordings that are kept for further questions; a second of
            audio is some 12 of them, and 1,000 of an 8B model take 16 MiB in float32.
        drain: seconds that requests in flight get to finish at shutdown.
    """

    rows: int = 16
    waiting: int = 64
    connections: int = 256
    bytes: int = 32 * 2**20
    characters: int = 32768
    audio: float = 600.0
    tokens: int = 1024
    deadline: float = 300.0
    body_seconds: float = 30.0
    remember: int = 8192
    drain: float = 30.0
