"""One model behind a server: from what a request asks to a ticket in the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch

from diffa.errors import AudioError, DiffaError, SpecError
from diffa.serving.audio import decode_recording
from diffa.serving.engine import Engine
from diffa.serving.errors import RequestError, bad_request, shutting_down
from diffa.serving.limits import Limits
from diffa.serving.metrics import Metrics
from diffa.serving.requests import Done, Event, Failed, Job, Ticket
from diffa.serving.sampler_options import Samplers
from diffa.serving.validation import Asked

T = TypeVar("T")
_HANDS = 4  # threads that decode recordings


class Prepared(NamedTuple):
    """A request that is ready for the engine: its job, deadline, and seconds of audio."""

    job: Job
    deadline: float
    seconds: float


class Service:
    """A model with its engine, samplers, limits and counters.

    Args:
        model: what answers.
        name: what clients call it.
        limits: what is taken.
        keys: API keys, any of which opens the server; none are needed where empty.
        hosts: ``host`` or ``host:port`` from which recordings may be fetched.

    Raises:
        SpecError: the backbone has no tokenizer.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        limits: Limits | None = None,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        self.model, self.name, self.keys, self.hosts = model, name, tuple(keys), tuple(hosts)
        self.limits = limits or Limits()
        self.chat = model.chat_format
        spec = model.spec.data
        self.sampler_presets: list[str] = list(
            spec.get("sampler_presets") or {}
        )  # MODEL:PRESET chooses one
        self._max_tokens = min(spec["prompt"]["max_tokens"], self.limits.tokens)
        self.started = int(time.time())
        self.samplers = Samplers(model)
        self.metrics = Metrics(lambda: self.engine)
        self.draining = False
        self.inflight = 0
        self._hands = ThreadPoolExecutor(
            _HANDS, "decode", initializer=torch.set_num_threads, initargs=(1,)
        )  # many at a time: each with a team of its own would wait for the lanes' cores
        self._tokenizer = threading.Lock()
        self.engine: Engine = Engine(
            model,
            rows=self.limits.rows,
            waiting=self.limits.waiting,
            remember=self.limits.remember,
            on_forward=lambda rows, _: self.metrics.rows.observe(rows),
        )

    def sampler_preset(self, name: object) -> str | None:
        """The sampler preset that a request's ``model`` names, or None; raises Refusal (404)."""
        if name is None or name == self.name:
            return None
        known = {
            f"{self.name}:{sampler_preset}": sampler_preset
            for sampler_preset in self.sampler_presets
        }
        if not isinstance(name, str) or name not in known:
            shown = ", ".join([self.name, *known])
            message = f"no model {str(name)[:100]!r}; this server has {shown}"
            raise RequestError(404, message, param="model", code="model_not_found")
        return known[name]

    async def hand(self, work: Callable[[], T]) -> T:
        """Run work that takes a while outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._hands, work)

    def check_open(self) -> None:
        """Refuse early while draining (503) or with a full queue (429)."""
        if self.draining:
            raise shutting_down()
        self.engine.check_room()

    def prepare(self, asked: Asked, *, watched: bool = False) -> Prepared:
        """Decode the recording, write the prompt, choose the sampler; raises Refusal."""
        chosen = self.samplers.choose(asked.sampler, asked.temperature, "sampler", asked.base)
        wave = None
        if asked.recording is not None:
            rate = self.model.encoder.sample_rate
            wave = decode_recording(asked.recording, rate, self.limits, "the recording")
        with self._tokenizer:
            prompt = self.chat.encode(asked.question, system=asked.system, audio=wave is not None)
        job = Job(
            prompt.tokens,
            wave,
            prompt.audio_at or 0,
            asked.max_tokens or self._max_tokens,
            chosen.sampler,
            chosen.kind,
            seed=asked.seed,
            watched=watched,
        )
        seconds = 0.0 if wave is None else len(wave) / self.model.encoder.sample_rate
        self.metrics.audio.inc(seconds)
        return Prepared(job, asked.deadline or self.limits.deadline, seconds)

    def close(self, wait: float = 0.0) -> None:
        """End what is in flight, after ``wait`` seconds at most."""
        self.draining = True
        self.engine.close(wait)
        self._hands.shutdown(wait=False, cancel_futures=True)


class Session:
    """One request in the engine, as the event loop sees it; cancelled when left early."""

    def __init__(self, service: Service, prepared: Prepared) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._service, self.begun = service, time.perf_counter()
        self.ticket = Ticket(prepared.job, self._notify, prepared.deadline)

    def __enter__(self) -> Session:
        self._service.engine.submit(self.ticket)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Stop waiting; where the answer is not there yet, it is not needed any more."""
        if self.ticket.open:
            self.ticket.cancel()
            self._service.metrics.ended.labels("cancelled").inc()

    async def next(self) -> Event:
        """The next event; errors are raised.

        Raises:
            Refusal: the request cannot be answered, or not before its deadline.
        """
        event = await self._events.get()
        if isinstance(event, Failed):
            self._service.metrics.ended.labels("failed").inc()
            raise refusal(event.error)
        if isinstance(event, Done):
            self._service.metrics.ended.labels("done").inc()
        return event

    def waiting(self) -> bool:
        """Whether another event is here already."""
        return not self._events.empty()

    @property
    def seconds(self) -> float:
        """Since the request entered the queue."""
        return time.perf_counter() - self.begun

    def _notify(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            return


def refusal(error: Exception) -> Exception:
    """What a client is told of an error: faults of the request are 400, others are ours."""
    if isinstance(error, AudioError | SpecError):
        return bad_request(str(error))
    if isinstance(error, RequestError) or not isinstance(error, DiffaError):
        return error
    return RequestError(500, str(error))
