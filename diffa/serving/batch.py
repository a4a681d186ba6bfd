"""Requests that came together: one canvas, one sampler, and a thread that waits at each forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.canvas.batch import CanvasInputs, initial_answer, make_canvas
from diffa.canvas.canvas import Canvas
from diffa.canvas.denoiser import Denoiser
from diffa.canvas.kv_cache import AttentionContext
from diffa.serving.batched_forward import Call
from diffa.serving.errors import log_error
from diffa.serving.requests import Done, Failed, Moment, Ticket
from diffa.types import PartialBackbone, Step

_log = logging.getLogger(__name__)


class Work(NamedTuple):
    """Something large that a cohort wants done by its lane, at once and for itself alone."""

    function: Callable[[Tensor], Tensor]
    given: Tensor

    def result(self) -> Tensor | Exception:
        """What comes of it; an error is the cohort's."""
        try:
            return self.function(self.given)
        except Exception as error:
            return error


Arrival = Call | Work | None  # what a cohort waits for; None: it is over


class Cohort:
    """Requests with the same sampler and answer length, admitted at the same moment.

    Args:
        backbone: answers the calls.
        tickets: the requests.
        heard: embeddings of each one's audio (N, W), or None.
        arrive: told when the cohort waits for a forward, with its call, or for other work of the
            lane's, and when it is over, with None.
    """

    def __init__(
        self,
        backbone: Any,
        tickets: Sequence[Ticket],
        heard: Sequence[Tensor | None],
        arrive: Callable[[Cohort, Arrival], None],
    ) -> None:
        self.tickets = tickets
        self._backbone, self._heard, self._arrive = backbone, heard, arrive
        self._replies: SimpleQueue[Tensor | Exception] = SimpleQueue()
        self._left = [True] * len(tickets)
        self.steps = 0

    @property
    def rows(self) -> int:
        """Requests that still want their answers."""
        pairs = zip(self.tickets, self._left, strict=True)
        return sum(ticket.open and left for ticket, left in pairs)

    def reply(self, found: Tensor | Exception) -> None:
        """Give what the cohort waits for, or what went wrong."""
        self._replies.put(found)

    def run(self) -> None:
        """Answer; to be called in a thread of its own. Never raises: tickets hear of errors."""
        try:
            with torch.no_grad():
                canvas = self._canvas()
                self._decode(canvas)
        except Exception as error:
            log_error(_log, f"{len(self.tickets)} requests fail at step {self.steps}", error)
            for ticket in self.tickets:
                ticket.end(Failed(error))
        finally:
            self._arrive(self, None)

    def _canvas(self) -> Canvas:
        jobs = [ticket.job for ticket in self.tickets]
        asked = CanvasInputs(
            [job.prompt for job in jobs],
            [job.wave for job in jobs],
            [job.audio_at for job in jobs],
            [job.seed for job in jobs],
            initial_answer([None] * len(jobs), jobs[0].max_tokens, self._backbone.vocab),
        )
        return make_canvas(self._backbone, asked, self._heard)

    def _decode(self, canvas: Canvas) -> None:
        sampler = self.tickets[0].job.sampler
        shared: Any = Shared(self._backbone, self._wait)  # offers what a Denoiser calls, no more
        denoise = Denoiser(shared, canvas)
        for step in sampler(canvas, denoise):
            self.steps += 1
            self._publish(step, canvas)
            if not any(self._left):
                return
        for row in range(len(self.tickets)):
            self._finish(row, canvas.answer[row])

    def _wait(self, wanted: Call | Work) -> Tensor:
        """Wait for a shared forward, or for work of the cohort's own."""
        self._arrive(self, wanted)
        found = self._replies.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _publish(self, step: Step, canvas: Canvas) -> None:
        """Tell each request what became of its row; let go of rows that nobody waits for."""
        done = step.final.all(dim=1).tolist()
        for row, ticket in enumerate(self.tickets):
            if not self._left[row]:
                continue
            if not ticket.open:
                self._leave(row, canvas)
                continue
            if ticket.job.watched:
                tokens, final, confidence = (values[row].cpu() for values in step)
                ticket.tell(Moment(tokens, final, confidence, self.steps))
            if done[row]:
                self._finish(row, step.tokens[row])

    def _finish(self, row: int, tokens: Tensor) -> None:
        if self._left[row]:
            self._left[row] = False
            ticket = self.tickets[row]
            ticket.end(Done(tokens.cpu().clone(), self.steps, ticket.heard))

    def _leave(self, row: int, canvas: Canvas) -> None:
        """Decide what is undecided, so that no forward is spent on the row."""
        self._left[row] = False
        there = torch.zeros_like(canvas.answer, dtype=torch.bool)
        there[row] = canvas.undecided()[row]
        canvas.fill(there, canvas.vocab.eos)


class Shared:
    """A backbone whose body is run for several canvases at once; the head is each one's own, but
    the same thread runs it."""

    def __init__(self, backbone: Any, run: Callable[[Call | Work], Tensor]) -> None:
        self._backbone, self._run = backbone, run
        self.partial = isinstance(backbone, PartialBackbone) and backbone.partial

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., W) -> logits (..., V)."""
        return self._run(Work(self._backbone.head, hidden))

    def __call__(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Hidden states (B, K, W), when the forward that they share has run."""
        return self._run(Call(embeds, positions, context))
