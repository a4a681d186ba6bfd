"""Requests that share a canvas: one sampler in a thread that pauses at each forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from diffa.canvas.batch import CanvasInputs, initial_answer, make_canvas
from diffa.canvas.denoiser import Denoiser
from diffa.canvas.prefix_cache import PrefixCache
from diffa.errors import is_out_of_memory
from diffa.serving.batched_forward import BackboneCall
from diffa.serving.errors import as_exception, log_error
from diffa.serving.likeliest import RecordingDenoiser
from diffa.serving.requests import FailedEvent, FinishedEvent, RequestHandle, StepEvent
from diffa.types import PartialBackbone

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas
    from diffa.canvas.kv_cache import AttentionContext
    from diffa.types import Backbone, BackboneModule, Step

_log = logging.getLogger(__name__)


class HeadCall(NamedTuple):
    """A call of the backbone's head on hidden states (..., W), for one canvas alone."""

    head: Callable[[Tensor], Tensor]
    hidden: Tensor

    def run(self) -> Tensor | Exception:
        """Return the logits (..., V), or the error to raise in the sampler's thread."""
        try:
            return self.head(self.hidden)
        except Exception as error:
            return error


Pause = BackboneCall | HeadCall | None
"""Why a batch's thread pauses: it waits for a result, or has ended (None)."""


class RequestBatch:
    """Requests with equal sampler options and answer length, admitted at the same moment.

    A sampler is an ordinary generator that calls ``denoise`` and waits for logits, so ``run``
    needs a thread of its own. It pauses at every call of the backbone; the worker answers with
    ``resume``.

    Args:
        backbone: embeds the prompts and computes the logits.
        handles: the requests, one row of the canvas each.
        embeds: audio embeddings (N, W) of each request, or None.
        on_pause: receives the batch and the reason whenever its thread pauses or ends.

    Attributes:
        retries: after an error, requests to be decoded in batches of their own.
    """

    def __init__(
        self,
        backbone: BackboneModule,
        handles: Sequence[RequestHandle],
        embeds: Sequence[Tensor | None],
        on_pause: Callable[[RequestBatch, Pause], None],
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.handles, self._prefix_cache = handles, prefix_cache
        self._backbone, self._embeds, self._on_pause = backbone, embeds, on_pause
        # A queue rather than an event: it hands the result over and wakes the thread in one step.
        self._results: SimpleQueue[Tensor | Exception] = SimpleQueue()
        self._unfinished = [True] * len(handles)
        self.retries: list[list[tuple[RequestHandle, Tensor | None]]] = []
        self._recorder: RecordingDenoiser | None = None
        self.num_forwards = 0

    @property
    def num_active(self) -> int:
        """Requests that are unfinished and still wanted."""
        pairs = zip(self.handles, self._unfinished, strict=True)
        return sum(handle.active and unfinished for handle, unfinished in pairs)

    def resume(self, result: Tensor | Exception) -> None:
        """Let the paused thread go on with a result, or raise an error in it."""
        self._results.put(result)

    def abandon(self, reason: Exception) -> None:
        """End the thread without an answer: its worker, which it waits for, has ended."""
        self._unfinished = [False] * len(self.handles)
        self.resume(reason)

    def run(self) -> None:
        """Decode the answers in the calling thread. Never raises: requests receive the error."""
        try:
            with torch.no_grad():  # the setting is per thread
                self._decode(self._make_canvas())
        except BaseException as error:  # of a sampler that raises SystemExit, too
            message = f"{len(self.handles)} requests fail after {self.num_forwards} forward passes"
            log_error(_log, message, error)
            self._retry_or_fail(error)
        finally:
            self._on_pause(self, None)  # the worker waits for it, also after an error

    def _retry_or_fail(self, error: BaseException) -> None:
        """Fail a single request; otherwise leave ``retries``: one request must not fail others.

        Seeds are the requests', so a retry decides the same tokens. Without memory each half
        may fit; after other errors each request is alone, and the one at fault fails alone.
        """
        triples = zip(self.handles, self._embeds, self._unfinished, strict=True)
        rest = [(handle, embeds) for handle, embeds, left in triples if left and handle.active]
        if len(rest) == 1 and len(self.handles) == 1:
            rest[0][0].finish(FailedEvent(as_exception(error)))
            return
        size = (len(rest) + 1) // 2 if is_out_of_memory(error) else 1
        self.retries = [rest[start : start + size] for start in range(0, len(rest), max(1, size))]

    def _make_canvas(self) -> Canvas:
        requests = [handle.request for handle in self.handles]
        inputs = CanvasInputs(
            [request.prompt for request in requests],
            [request.waveform for request in requests],
            [request.audio_at for request in requests],
            [request.seed for request in requests],
            initial_answer([None] * len(requests), requests[0].max_tokens, self._backbone.vocab),
        )
        return make_canvas(self._backbone, inputs, self._embeds)

    def _decode(self, canvas: Canvas) -> None:
        proxy = BackboneProxy(self._backbone, self._pause)
        count = max(handle.request.top_logprobs for handle in self.handles)
        backbone = cast("Backbone", proxy)
        denoise = (
            RecordingDenoiser(backbone, canvas, count) if count else Denoiser(backbone, canvas)
        )
        self._recorder = denoise if isinstance(denoise, RecordingDenoiser) else None
        step: Step | None = None
        sampler, prefixes = self.handles[0].request.sampler, self._prefix_cache
        if getattr(sampler, "cfg_scale", 0):  # its unconditional rows are not the prompt's
            prefixes = None
        if prefixes is not None:
            prefixes.load(canvas, denoise.kv_cache)
        for step in sampler(canvas, denoise):
            if prefixes is not None and self.num_forwards == 0:
                prefixes.store(canvas, denoise.kv_cache)
            self.num_forwards += 1
            denoise.check_finite()  # no row of numbers that are none is published
            if self._recorder is not None:
                self._recorder.keep(step.tokens)
            self._publish(step, canvas)
            if not any(self._unfinished):
                return
        denoise.check_finite()
        for row in range(len(self.handles)):
            self._finish(
                row,
                canvas.answer[row, : canvas.requested],
                None if step is None else step.confidence[row],
            )

    def _pause(self, call: BackboneCall | HeadCall) -> Tensor:
        """Hand a call to the worker and wait for its result."""
        self._on_pause(self, call)
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def _publish(self, step: Step, canvas: Canvas) -> None:
        """Report each row's step; finish rows that are final, drop rows that were cancelled."""
        final = step.final.all(dim=1).tolist()
        for row, handle in enumerate(self.handles):
            if not self._unfinished[row]:
                continue
            if not handle.active:
                self._drop(row, canvas)
                continue
            if handle.request.stream:
                tokens, is_final, confidence = (values[row].cpu() for values in step)
                handle.publish(StepEvent(tokens, is_final, confidence, self.num_forwards))
            if final[row]:
                self._finish(row, step.tokens[row], step.confidence[row])

    def _finish(self, row: int, tokens: Tensor, confidence: Tensor | None) -> None:
        if self._unfinished[row]:
            self._unfinished[row] = False
            handle, answer = self.handles[row], tokens.cpu().clone()
            confidence = None if confidence is None else confidence.cpu().clone()
            counts = self.num_forwards, handle.num_audio_embeds
            count, recorder = handle.request.top_logprobs, self._recorder
            likeliest = recorder.of_row(row, len(answer)) if recorder and count else None
            handle.finish(FinishedEvent(answer, *counts, confidence, likeliest))

    def _drop(self, row: int, canvas: Canvas) -> None:
        """Fill a row with EOS: samplers leave decided rows out of their forward passes."""
        self._unfinished[row] = False
        undecided = torch.zeros_like(canvas.answer, dtype=torch.bool)
        undecided[row] = canvas.undecided()[row]
        canvas.fill(undecided, canvas.vocab.eos)


class BackboneProxy:
    """What a ``Denoiser`` calls in place of the backbone: every call is run by the worker.

    The body is shared with other canvases. The head is not, but the worker runs it as well: it is
    a large matrix product, and the worker's thread has the CPU cores.
    """

    def __init__(
        self, backbone: BackboneModule, run: Callable[[BackboneCall | HeadCall], Tensor]
    ) -> None:
        self._backbone, self._run = backbone, run
        self.partial = isinstance(backbone, PartialBackbone) and backbone.partial

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., W)."""
        return self._run(HeadCall(self._backbone.head, hidden))

    def __call__(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Return hidden states (B, K, W) from the next shared forward pass."""
        return self._run(BackboneCall(embeds, positions, context))
