"""A request inside the engine: what to generate, its handle, and the events it produces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.types import Sampler


class GenerationRequest(NamedTuple):
    """What the engine needs to know of a request.

    Attributes:
        prompt: token ids (L,).
        waveform: the recording at the encoder's rate (S,), or None.
        audio_at: index in the prompt before which the audio embeddings go.
        max_tokens: answer slots of the canvas.
        sampler: decodes the answer.
        sampler_key: equal for samplers with equal options.
        seed: seed of the sampler's draws.
        stream: whether every step is reported, or the finished answer alone.
        top_logprobs: likeliest tokens to report of each slot.
    """

    prompt: Tensor
    waveform: Tensor | None
    audio_at: int
    max_tokens: int
    sampler: Sampler
    sampler_key: Hashable
    seed: int = 0
    stream: bool = False
    top_logprobs: int = 0

    @property
    def batch_key(self) -> Hashable:
        """Equal for requests that can share a canvas."""
        return self.sampler_key, self.max_tokens


class LikelyTokens(NamedTuple):
    """Token ids (A, k) and their log-probabilities (A, k), the likeliest first."""

    ids: Tensor
    log_probs: Tensor


class StartedEvent(NamedTuple):
    """The request has left the queue."""


class StepEvent(NamedTuple):
    """One row of a ``Step``: tokens, which of them are final, and confidences, (A,) each."""

    tokens: Tensor
    final: Tensor
    confidence: Tensor
    num_forwards: int


class FinishedEvent(NamedTuple):
    """The answer (A,), the forward passes it took, and the number of its audio embeddings.

    ``confidence`` (A,) is the probability of each token when it was written; ``likeliest`` are
    the likeliest tokens at that pass, if they were asked for.
    """

    tokens: Tensor
    num_forwards: int
    num_audio_embeds: int
    confidence: Tensor | None = None
    likeliest: LikelyTokens | None = None


class FailedEvent(NamedTuple):
    """The error because of which there is no answer."""

    error: Exception


Event = StartedEvent | StepEvent | FinishedEvent | FailedEvent


class RequestHandle:
    """A submitted request. It ends once: with ``FinishedEvent``, ``FailedEvent`` or ``cancel``.

    Args:
        request: what to generate.
        on_event: receives every event, in threads of the engine; must return at once.
        deadline: seconds from the arrival until the answer must be finished.
        arrived: when the request arrived (``time.monotonic``). Default: now.
    """

    def __init__(
        self,
        request: GenerationRequest,
        on_event: Callable[[Event], None],
        deadline: float,
        arrived: float | None = None,
    ) -> None:
        self.request, self.deadline = request, deadline
        self.expires_at = (time.monotonic() if arrived is None else arrived) + deadline
        self.num_audio_embeds = 0
        # A worker has ended while it decoded this and other requests: one of them is at fault.
        self.suspect = False
        self._on_event, self._active = on_event, True
        # A worker, a sampler's thread, the engine's close() and the client's disconnect may end a
        # request at the same time; the lock lets exactly one of them report.
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether a client still waits for the answer."""
        return self._active

    def publish(self, event: Event) -> None:
        """Report progress, unless the request has ended."""
        if self._active:
            self._on_event(event)

    def finish(self, event: FinishedEvent | FailedEvent) -> None:
        """End with an answer or an error; only the first end is reported."""
        with self._lock:
            was_active, self._active = self._active, False
        if was_active:
            self._on_event(event)

    def fail_if_expired(self, now: float, error: Callable[[float], Exception]) -> None:
        """End with ``error(deadline)`` when the deadline has passed."""
        if self._active and now > self.expires_at:
            self.finish(FailedEvent(error(self.deadline)))

    def cancel(self) -> None:
        """End without a report; the row leaves its batch before the next forward pass."""
        with self._lock:
            self._active = False
