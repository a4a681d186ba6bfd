"""Continuous batching of one model replica: the loop that runs its forward passes."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffa.canvas.batch import check_context_length
from diffa.serving.batch import HeadCall, Pause, RequestBatch
from diffa.serving.batched_forward import BackboneCall, run_together
from diffa.serving.errors import as_exception, deadline_exceeded, log_error
from diffa.serving.requests import FailedEvent, RequestHandle, StartedEvent
from diffa.types import max_length

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.serving.encoder_cache import EncoderCache

_log = logging.getLogger(__name__)


class Worker:
    """Batch requests of a model in a thread of its own (continuous batching).

    Requests join and leave between two forward passes. Requests with equal sampler options form a
    ``RequestBatch`` with one canvas; the batches share forward passes, whatever their samplers.
    A sampler is an ordinary generator that calls ``denoise`` and waits for its logits. So each
    batch's sampler has a thread of its own, and one of them or the worker runs at any time:

        worker      | backbone for a, b |   | resume a |   | resume b |   | backbone for a, b |
        sampler a   waits                   samples, pauses                waits
        sampler b   waits                              samples, pauses     waits

    Args:
        model: Shared by all workers; its weights are only read.
        encoder_cache: Encodes recordings, and keeps recent results.
        max_batch_size: Requests decoded at the same time.
        sampler_threads: Runs the samplers of the batches, one thread each.
        next_requests: Blocks until there is work. Returns new requests, [] if there are none but
            batches are running, None at shutdown.
        num_threads: Returns the threads that PyTorch may use in this worker from now on.
        on_forward: Receives the rows of each forward pass and its seconds.
        on_batch_end: Receives the number of requests of each batch that ends.
        on_end: Called when an error ends the worker; receives its unfinished requests.

    Attributes:
        batches: The batches that are running.
        idle: Whether the worker waits for requests; guarded by the engine's lock.
        was_used: Whether it has ever decoded; guarded by the engine's lock.
    """

    def __init__(
        self,
        model: Model,
        encoder_cache: EncoderCache,
        max_batch_size: int,
        sampler_threads: Executor,
        *,
        next_requests: Callable[[Worker], Sequence[RequestHandle] | None],
        num_threads: Callable[[], int],
        on_forward: Callable[[int, float], None],
        on_batch_end: Callable[[int], None],
        on_end: Callable[[Worker, Sequence[RequestHandle]], None],
    ) -> None:
        self.model, self.batches = model, list[RequestBatch]()
        self.idle, self.was_used = True, False
        self.max_batch_size = max_batch_size
        self._encoder_cache, self._sampler_threads = encoder_cache, sampler_threads
        self._next_requests, self._num_threads = next_requests, num_threads
        self._on_forward, self._on_batch_end = on_forward, on_batch_end
        self._on_end = on_end
        # Filled by the batches' threads, emptied by this worker's alone.
        self._pauses: SimpleQueue[tuple[RequestBatch, Pause]] = SimpleQueue()
        self._pending: list[tuple[RequestBatch, BackboneCall]] = []
        # A daemon: a request that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._run, name="worker", daemon=True)

    @property
    def num_active(self) -> int:
        """Requests that are being decoded; may be read from any thread."""
        return sum(batch.num_active for batch in tuple(self.batches))

    def _run(self) -> None:
        with torch.no_grad():  # the setting is per thread
            new: Sequence[RequestHandle] | None = ()
            try:
                while (new := self._next_requests(self)) is not None:
                    self._set_num_threads()
                    self._start_batches(new)
                    if self.batches:
                        self._set_num_threads()  # encoding took a while: others may have begun
                        self._step()
                    new = ()
            except BaseException as error:
                self._end(error, new or ())

    def _end(self, error: BaseException, new: Sequence[RequestHandle]) -> None:
        """Let the engine start another worker, and decode each of the requests alone.

        The answer of a request does not depend on that. A request that was alone fails.
        """
        log_error(_log, "a worker ends", error)
        reason, batches = as_exception(error), tuple(self.batches)
        handles = dict.fromkeys((*new, *(one for batch in batches for one in batch.handles)))
        rest = [handle for handle in handles if handle.active]
        for batch in batches:
            batch.abandon(reason)
        self.batches.clear()
        for handle in rest:
            handle.suspect = True
            if len(rest) == 1:
                handle.finish(FailedEvent(reason))
        self._on_end(self, rest)

    def _set_num_threads(self) -> None:
        torch.set_num_threads(self._num_threads())  # PyTorch keeps the number per thread

    def _start_batches(self, new: Sequence[RequestHandle]) -> None:
        """Encode the recordings of new requests, and run their canvases to the first pause."""
        groups: dict[Hashable, list[tuple[RequestHandle, Tensor | None]]] = defaultdict(list)
        for handle, embeds in self._encode(new):
            handle.publish(StartedEvent())
            groups[handle.request.batch_key].append((handle, embeds))
        for pairs in groups.values():
            self._start_batch(pairs)

    def _start_batch(self, pairs: Sequence[tuple[RequestHandle, Tensor | None]]) -> None:
        handles, rows = zip(*pairs, strict=True)
        batch = RequestBatch(
            self.model.backbone, handles, rows, self._on_pause, self._encoder_cache.prefix_cache
        )
        self.batches.append(batch)
        self._sampler_threads.submit(batch.run)
        self._run_until_pause()

    def _encode(self, new: Sequence[RequestHandle]) -> list[tuple[RequestHandle, Tensor | None]]:
        """Return requests with their audio embeddings (N, W); fail those that cannot begin."""
        pairs: list[tuple[RequestHandle, Tensor | None]] = []
        recordings: list[tuple[RequestHandle, Tensor]] = []
        for handle in new:
            if handle.request.waveform is None:
                pairs.append((handle, None))
            else:
                recordings.append((handle, handle.request.waveform))
        results = self._encoder_cache.encode([waveform for _, waveform in recordings])
        for (handle, waveform), embeds in zip(recordings, results, strict=True):
            if isinstance(embeds, Exception):
                log_error(_log, f"a recording of {len(waveform)} samples is not encoded", embeds)
                handle.finish(FailedEvent(embeds))
            else:
                handle.num_audio_embeds = len(embeds)
                pairs.append((handle, embeds))
        return [pair for pair in pairs if self._fits_context(pair[0])]

    def _fits_context(self, handle: RequestHandle) -> bool:
        """Whether a request fits the backbone's context; fail it if not."""
        request, audio = handle.request, handle.num_audio_embeds
        samples = 0 if request.waveform is None else len(request.waveform)
        seconds = samples / self.model.encoder.sample_rate
        longest = max_length(self.model.backbone)
        try:
            check_context_length(len(request.prompt), audio, request.max_tokens, seconds, longest)
        except Exception as error:
            log_error(_log, "a request does not begin", error)
            handle.finish(FailedEvent(error))
        return handle.active

    def _on_pause(self, batch: RequestBatch, pause: Pause) -> None:
        """Queue a pause of a batch; runs in the batch's thread."""
        self._pauses.put((batch, pause))

    def _run_until_pause(self) -> None:
        """Wait until the one batch that runs now needs a forward pass or ends; run its head.

        Batches run one after the other on purpose. Between two passes a sampler is many small
        operations: threads running at once would hand Python's global lock around at each.
        """
        while True:
            batch, pause = self._pauses.get()
            if not isinstance(pause, HeadCall):
                break
            batch.resume(pause.run())
        if pause is None:
            self.batches.remove(batch)
            self._on_batch_end(len(batch.handles))
            for pairs in batch.retries:
                self._start_batch(pairs)
        else:
            self._pending.append((batch, pause))

    def _step(self) -> None:
        """Run the pending calls in one forward pass, then each batch to its next pause."""
        begin = time.monotonic()
        pending, self._pending = self._pending, []
        if not pending:
            return
        calls = [call for _, call in pending]
        results = self._run_backbone(calls)
        now = time.monotonic()
        self._on_forward(sum(len(call.embeds) for call in calls), now - begin)
        for (batch, _), hidden in zip(pending, results, strict=True):
            batch.resume(hidden)
            self._run_until_pause()
            for handle in batch.handles:
                handle.fail_if_expired(now, deadline_exceeded)

    def _run_backbone(self, calls: Sequence[BackboneCall]) -> Sequence[Tensor | Exception]:
        """Return the hidden states or the error of every call.

        If the shared pass fails, each call is run alone, so that one request's fault (or too
        large a batch for the memory) does not fail the others.
        """
        backbone = self.model.backbone
        try:
            return run_together(backbone, calls)
        except Exception as error:
            message = f"a forward pass of {len(calls)} canvases fails, each is run alone"
            log_error(_log, message, error)
        results: list[Tensor | Exception] = []
        for call in calls:
            try:
                results.append(backbone(*call))
            except Exception as error:  # the batch that gets it logs it and fails its requests
                results.append(error)
        return results
