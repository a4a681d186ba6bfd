"""One model behind a server: prepares requests, and shows their events to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from diffa.errors import AudioError
from diffa.runtime.memory import release_free_memory
from diffa.serving.audio import SentRecording, decode_recording, probe_seconds
from diffa.serving.download import RemoteRecording, download_recording
from diffa.serving.engine import Engine
from diffa.serving.errors import (
    RequestError,
    bad_request,
    deadline_exceeded,
    public_error,
    shutting_down,
)
from diffa.serving.limits import Limits
from diffa.serving.metrics import Metrics
from diffa.serving.pools import Deadline, WorkPool
from diffa.serving.requests import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestHandle,
)
from diffa.serving.sampler_options import SamplerCache

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.model import Model
    from diffa.serving.validation import Query

_BRIEF = 60.0  # seconds of a recording that does not wait behind longer ones


class PreparedRequest(NamedTuple):
    """A request ready for the engine, its deadline, the seconds of its recording, its stops, and
    whether its answer carries log-probabilities."""

    request: GenerationRequest
    deadline: Deadline
    audio_seconds: float
    stops: tuple[str, ...] = ()
    logprobs: bool = False


class Service:
    """A model with its engine, samplers, limits and metrics.

    Args:
        model: answers the requests.
        name: the model's name for clients.
        limits: what is accepted. Default: ``Limits()``.
        api_keys: keys that are accepted. Empty: none is needed.
        allowed_hosts: ``host`` or ``host:port`` from which recordings may be downloaded.
        allowed_origins: web origins whose pages may send requests, or ``*``. Empty: none.

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
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self.model, self.name = model, name
        self.api_keys, self.allowed_hosts = tuple(api_keys), tuple(allowed_hosts)
        self.allowed_origins = tuple(allowed_origins)
        self.limits = limits or Limits()
        self.chat = model.chat_format
        self.created = int(time.time())
        self.samplers = SamplerCache(model)
        self.draining = False
        self.num_inflight = 0  # requests under /v1/, whose bodies or responses are under way
        # Four slow downloads or four large uploads must not delay an ordinary question.
        most, few = self.limits.max_connections, self.limits.max_waiting
        self.parsers = WorkPool("parsing", 2, most)
        self._decoders = WorkPool("decoding", 2, most)
        self._long_decoders = WorkPool("decoding long recordings", 2, few)
        self._downloads = WorkPool("downloads", 4, few)
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

    def check_available(self) -> None:
        """Refuse before a body is read, while draining (503) or with a full queue (429)."""
        if self.draining:
            raise shutting_down()
        self.engine.check_queue()

    async def prepare(self, query: Query, deadline: Deadline) -> PreparedRequest:
        """Download and decode the recording, tokenise the prompt and build the sampler.

        Raises:
            RequestError: the request is at fault, or its deadline passes meanwhile.
        """
        if query.deadline is not None:
            deadline = deadline._replace(seconds=query.deadline)
        recording, waveform = query.recording, None
        if isinstance(recording, RemoteRecording):
            work = partial(download_recording, recording, self.limits)
            recording = SentRecording(await self._downloads.run(work, deadline), recording.param)
        if recording is not None:
            waveform = await self._decode(recording, query, deadline)
        request = await self.parsers.run(partial(self._build, query, waveform), deadline)
        seconds = 0.0 if waveform is None else len(waveform) / self.model.encoder.sample_rate
        self.metrics.audio_seconds.inc(seconds)
        return PreparedRequest(request, deadline, seconds, query.stops, query.logprobs)

    async def _decode(self, recording: SentRecording, query: Query, deadline: Deadline) -> Tensor:
        """Return the waveform (S,) of a file, unless its header says that it does not fit."""
        seconds = await self.parsers.run(partial(self._check_header, recording, query), deadline)
        pool = self._decoders if 0 < seconds <= _BRIEF else self._long_decoders
        rate = self.model.encoder.sample_rate

        def decode() -> Tensor:
            try:
                waveform = decode_recording(recording, rate, self.limits)
                if len(waveform) > seconds * rate + rate:  # more than its header says
                    self._check_duration(len(waveform) / rate, query)
                return waveform
            finally:
                if pool is self._long_decoders:
                    release_free_memory()

        return await pool.run(decode, deadline)

    def _check_header(self, recording: SentRecording, query: Query) -> float:
        seconds = probe_seconds(recording.data)
        if seconds <= self.limits.max_audio_seconds:  # decoding refuses what is longer
            self._check_duration(seconds, query)
        return seconds

    def _check_duration(self, seconds: float, query: Query) -> None:
        try:
            self.model.check_duration(seconds, query.max_tokens or self._default_tokens)
        except AudioError as error:
            raise bad_request(str(error), query.recording and query.recording.param) from error

    @property
    def _default_tokens(self) -> int:
        tokens: int = self.model.spec.data["prompt"]["max_tokens"]
        return min(tokens, self.limits.max_tokens)

    def _build(self, query: Query, waveform: Tensor | None) -> GenerationRequest:
        preset = self.preset_of(query.model)
        sampler = self.samplers.get(query.sampler, query.temperature, "sampler", preset)
        with self._tokenizer_lock:
            prompt = self.chat.encode(
                query.question, system=query.system, audio=waveform is not None
            )
        return GenerationRequest(
            prompt.tokens,
            waveform,
            prompt.audio_at or 0,
            query.max_tokens or self._default_tokens,
            sampler.sampler,
            sampler.key,
            seed=query.seed,
            stream=query.stream,
            top_logprobs=query.top_logprobs,
        )

    def close(self, timeout: float = 0.0) -> None:
        """End running requests, after ``timeout`` seconds at most."""
        self.draining = True
        self.engine.close(timeout)
        for pool in (self.parsers, self._decoders, self._long_decoders, self._downloads):
            pool.close()


class EventStream:
    """The events of one request in the event loop; leaving it early cancels the request."""

    def __init__(self, service: Service, prepared: PreparedRequest) -> None:
        # asyncio's queue belongs to the loop's thread; the engine's threads reach it through
        # call_soon_threadsafe alone.
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self.prepared, self._service, self._begin = prepared, service, time.perf_counter()
        self._handle = RequestHandle(prepared.request, self._on_event, *prepared.deadline)

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
        handle = self._handle
        try:  # the engine checks deadlines between forward passes: one may hang
            async with asyncio.timeout(handle.expires_at - time.monotonic()):
                event = await self._events.get()
        except TimeoutError:
            handle.finish(FailedEvent(deadline_exceeded(handle.deadline)))
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
