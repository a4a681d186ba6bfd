"""One model behind a server: prepares requests, and shows their events to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from diffa.serving.audio import decode_recording
from diffa.serving.engine import Engine
from diffa.serving.errors import RequestError, public_error, shutting_down
from diffa.serving.limits import Limits
from diffa.serving.metrics import Metrics
from diffa.serving.requests import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestHandle,
)
from diffa.serving.sampler_options import SamplerCache

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.serving.validation import Query

T = TypeVar("T")
_PREPARE_THREADS = 4


class PreparedRequest(NamedTuple):
    """A request ready for the engine, its deadline, and the seconds of its recording."""

    request: GenerationRequest
    deadline: float
    audio_seconds: float


class Service:
    """A model with its engine, samplers, limits and metrics.

    Args:
        model: answers the requests.
        name: the model's name for clients.
        limits: what is accepted. Default: ``Limits()``.
        api_keys: keys that are accepted. Empty: none is needed.
        allowed_hosts: ``host`` or ``host:port`` from which recordings may be downloaded.

    Raises:
        SpecError: the backbone has no tokenizer.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        limits: Limits | None = None,
        api_keys: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        self.model, self.name = model, name
        self.api_keys, self.allowed_hosts = tuple(api_keys), tuple(allowed_hosts)
        self.limits = limits or Limits()
        self.chat = model.chat_format
        self.created = int(time.time())
        self.samplers = SamplerCache(model)
        self.draining = False
        self.num_inflight = 0  # requests under /v1/, whose bodies or responses are under way
        # Decoding audio and downloading would block the event loop. One PyTorch thread each: many
        # requests arrive at a time, and thread teams would compete for the workers' cores.
        self._threads = ThreadPoolExecutor(
            _PREPARE_THREADS, "prepare", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._tokenizer_lock = threading.Lock()  # tokenizers are not safe to share among threads
        self.engine = Engine(
            model,
            max_batch_size=self.limits.max_batch_size,
            max_waiting=self.limits.max_waiting,
            cached_embeddings=self.limits.cached_embeddings,
            on_forward=lambda num_rows, _: self.metrics.batch_size.observe(num_rows),
        )
        self.metrics = Metrics(self.engine.load)

    @property
    def model_names(self) -> list[str]:
        """The model's name, and ``NAME:PRESET`` for each sampler preset of its spec."""
        presets = self.model.spec.data.get("sampler_presets") or {}
        return [self.name, *(f"{self.name}:{preset}" for preset in presets)]

    def preset_of(self, model_name: str | None) -> str | None:
        """Return the sampler preset that a request's ``model`` names; None: the spec's sampler.

        Raises:
            RequestError: there is no such model (404).
        """
        if model_name is None or model_name == self.name:
            return None
        if model_name not in self.model_names:
            known = ", ".join(self.model_names)
            message = f"no model {model_name[:100]!r}; this server has {known}"
            raise RequestError(404, message, param="model", code="model_not_found")
        return model_name.removeprefix(f"{self.name}:")

    async def run_in_thread(self, work: Callable[[], T]) -> T:
        """Run work that would block the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def check_available(self) -> None:
        """Refuse before a body is read, while draining (503) or with a full queue (429)."""
        if self.draining:
            raise shutting_down()
        self.engine.check_queue()

    def prepare(self, query: Query) -> PreparedRequest:
        """Decode the recording, tokenise the prompt and build the sampler; raises RequestError."""
        preset = self.preset_of(query.model)
        sampler = self.samplers.get(query.sampler, query.temperature, "sampler", preset)
        waveform, rate = None, self.model.encoder.sample_rate
        if query.recording is not None:
            waveform = decode_recording(query.recording, rate, self.limits, "the recording")
        with self._tokenizer_lock:
            prompt = self.chat.encode(
                query.question, system=query.system, audio=waveform is not None
            )
        default = min(self.model.spec.data["prompt"]["max_tokens"], self.limits.max_tokens)
        request = GenerationRequest(
            prompt.tokens,
            waveform,
            prompt.audio_at or 0,
            query.max_tokens or default,
            sampler.sampler,
            sampler.key,
            seed=query.seed,
            stream=query.stream,
        )
        seconds = 0.0 if waveform is None else len(waveform) / rate
        self.metrics.audio_seconds.inc(seconds)
        return PreparedRequest(request, query.deadline or self.limits.deadline, seconds)

    def close(self, timeout: float = 0.0) -> None:
        """End running requests, after ``timeout`` seconds at most."""
        self.draining = True
        self.engine.close(timeout)
        self._threads.shutdown(wait=False, cancel_futures=True)


class EventStream:
    """The events of one request in the event loop; leaving it early cancels the request."""

    def __init__(self, service: Service, prepared: PreparedRequest) -> None:
        # asyncio's queue belongs to the loop's thread; the engine's threads reach it through
        # call_soon_threadsafe alone.
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._service, self._begin = service, time.perf_counter()
        self._handle = RequestHandle(prepared.request, self._on_event, prepared.deadline)

    def __enter__(self) -> EventStream:
        self._service.engine.submit(self._handle)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the request, unless it has ended."""
        if self._handle.active:
            self._handle.cancel()
            self._service.metrics.finished.labels("cancelled").inc()

    async def next(self) -> Event:
        """Return the next event.

        Raises:
            RequestError: the request fails, or its deadline passes.
        """
        event = await self._events.get()
        if isinstance(event, FailedEvent):
            self._service.metrics.finished.labels("failed").inc()
            raise public_error(event.error)
        if isinstance(event, FinishedEvent):
            self._service.metrics.finished.labels("done").inc()
        return event

    def has_event(self) -> bool:
        """Whether ``next`` would return at once."""
        return not self._events.empty()

    @property
    def seconds(self) -> float:
        """Seconds since the request was submitted."""
        return time.perf_counter() - self._begin

    def _on_event(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: no client waits any more
            return
