"""A request on its way through the engine: what is asked, and what becomes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor


class Job(NamedTuple):
    """What the engine needs to know of a request.

    Attributes:
        prompt: token ids (L,).
        wave: at the encoder's rate (S,), or None.
        audio_at: index in the prompt before which the audio goes.
        max_tokens: length of the answer.
        sampler: what decodes it.
        kind: equal for equal samplers: their options.
        seed: of the sampler's draws.
        watched: whether every step is wanted, not the answer alone.
    """

    prompt: Tensor
    wave: Tensor | None
    audio_at: int
    max_tokens: int
    sampler: Any
    kind: Hashable
    seed: int = 0
    watched: bool = False

    @property
    def shape(self) -> Hashable:
        """Equal for requests that one canvas may hold."""
        return self.kind, self.max_tokens


class Begun(NamedTuple):
    """The request has left the queue."""


class Moment(NamedTuple):
    """One row of a ``Step``: tokens, which are final, and confidences, (A,) each."""

    tokens: Tensor
    final: Tensor
    confidence: Tensor
    num_forwards: int


class Done(NamedTuple):
    """The answer: tokens (A,), forwards it took, and embeddings its audio became."""

    tokens: Tensor
    num_forwards: int
    heard: int


class Failed(NamedTuple):
    """No answer, and why."""

    error: Exception


Event = Begun | Moment | Done | Failed


class Ticket:
    """A request in the engine. It ends exactly once: with ``Done``, ``Failed``, or ``cancel``.

    Args:
        job: what is asked.
        notify: called with every event, from the engine's threads; must return at once.
        deadline: seconds from now until the answer must be there.
    """

    def __init__(self, job: Job, notify: Callable[[Event], None], deadline: float) -> None:
        self.job, self.deadline = job, deadline
        self.until = time.monotonic() + deadline
        self.heard = 0
        self._notify, self._open, self._lock = notify, True, threading.Lock()

    @property
    def open(self) -> bool:
        """Whether anybody still waits for the answer."""
        return self._open

    def tell(self, event: Event) -> None:
        """Report progress, unless the ticket has ended."""
        if self._open:
            self._notify(event)

    def end(self, event: Done | Failed) -> None:
        """End with an answer or an error; only the first end counts."""
        with self._lock:
            first, self._open = self._open, False
        if first:
            self._notify(event)

    def cancel(self) -> None:
        """Nobody waits any more; the row leaves its batch at the next forward."""
        with self._lock:
            self._open = False
