"""One lane of an engine: the canvases that share its forwards, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from diffa.canvas.batch import check_context_length
from diffa.serving.batch import Arrival, Cohort, Work
from diffa.serving.batched_forward import Call, together
from diffa.serving.encoder_cache import Ears
from diffa.serving.errors import deadline_exceeded, log_error
from diffa.serving.requests import Begun, Failed, Ticket
from diffa.types import max_length

_log = logging.getLogger(__name__)


class Lane:
    """Answers requests in forwards that they share; they join and leave between two of them.

    Args:
        model: what answers.
        ears: hear the recordings.
        most: requests that it answers at a time.
        hands: where the canvases' threads come from.
        take: waits for requests and gives those that this lane is to begin with, which may be
            none while it has others; None when there is nothing left to do.
        threads: of PyTorch's operations, asked before the lane listens and before every forward.
        on_forward: told the rows of every forward and its seconds.
        on_end: told of every request that ended here.
    """

    def __init__(
        self,
        model: Any,
        ears: Ears,
        most: int,
        hands: Executor,
        *,
        take: Callable[[Lane], Sequence[Ticket] | None],
        threads: Callable[[], int],
        on_forward: Callable[[int, float], None],
        on_end: Callable[[int], None],
    ) -> None:
        self.model, self.cohorts = model, list[Cohort]()
        self.idle, self.worked = True, False  # now; ever
        self.most = most
        self._ears, self._hands, self._take = ears, hands, take
        self._threads, self._on_forward, self._on_end = threads, on_forward, on_end
        self._arrivals: SimpleQueue[tuple[Cohort, Arrival]] = SimpleQueue()
        self._waiting: list[tuple[Cohort, Call]] = []
        self.thread = threading.Thread(target=self._loop, name="lane", daemon=True)

    @property
    def rows(self) -> int:
        """Requests that are being answered."""
        return sum(cohort.rows for cohort in tuple(self.cohorts))

    def _loop(self) -> None:
        with torch.no_grad():
            while (fresh := self._take(self)) is not None:
                try:
                    self._share_cores()
                    self._open(fresh)
                    if self.cohorts:
                        self._share_cores()
                        self._forward()
                except Exception as error:  # a fault of the lane's own: nobody is to hang on it
                    log_error(_log, "a lane ends", error)
                    for cohort in self.cohorts:
                        cohort.reply(error)  # its thread waits for a forward that will not come
                    for ticket in fresh:
                        ticket.end(Failed(error))
                    raise

    def _share_cores(self) -> None:
        torch.set_num_threads(self._threads())  # PyTorch keeps the number for each thread

    def _open(self, fresh: Sequence[Ticket]) -> None:
        """Listen to the newcomers' recordings and start their canvases."""
        kinds: dict[Any, list[tuple[Ticket, Tensor | None]]] = {}
        for ticket, heard in self._heard(fresh):
            ticket.tell(Begun())
            kinds.setdefault(ticket.job.shape, []).append((ticket, heard))
        for pairs in kinds.values():
            tickets, heard_ = zip(*pairs, strict=True)
            cohort = Cohort(self.model.backbone, tickets, heard_, self._arrive)
            self.cohorts.append(cohort)
            self._hands.submit(cohort.run)
            self._await()

    def _heard(self, fresh: Sequence[Ticket]) -> list[tuple[Ticket, Tensor | None]]:
        """Each newcomer with its audio's embeddings (N, W); those that cannot be heard are told."""
        made: list[tuple[Ticket, Tensor | None]] = []
        made += [(ticket, None) for ticket in fresh if ticket.job.wave is None]
        spoken = [(ticket, ticket.job.wave) for ticket in fresh if ticket.job.wave is not None]
        heard = self._ears([wave for _, wave in spoken])
        for (ticket, wave), embeds in zip(spoken, heard, strict=True):
            if isinstance(embeds, Exception):
                log_error(_log, f"a recording of {len(wave)} samples is not heard", embeds)
                ticket.end(Failed(embeds))
            else:
                made.append((ticket, embeds))
        return [pair for pair in made if self._fits(*pair)]

    def _fits(self, ticket: Ticket, heard: Tensor | None) -> bool:
        """Whether a request fits the backbone's context; it is told where not."""
        job, model = ticket.job, self.model
        ticket.heard = 0 if heard is None else len(heard)
        seconds = 0.0 if job.wave is None else len(job.wave) / model.encoder.sample_rate
        most = max_length(model.backbone)
        try:
            check_context_length(len(job.prompt), ticket.heard, job.max_tokens, seconds, most)
        except Exception as error:
            log_error(_log, "a request does not begin", error)
            ticket.end(Failed(error))
        return ticket.open

    def _arrive(self, cohort: Cohort, arrival: Arrival) -> None:
        self._arrivals.put((cohort, arrival))

    def _await(self) -> None:
        """Wait until the one cohort that runs now waits for its forward, or is over; meanwhile do
        its large work, for which this thread has the cores.

        They take turns: of threads that run at the same time, all but one would wait for Python's
        lock, and each of a step's many small operations would hand it on.
        """
        while True:
            cohort, arrival = self._arrivals.get()
            if not isinstance(arrival, Work):
                break
            cohort.reply(arrival.result())
        if arrival is None:
            self.cohorts.remove(cohort)
            self._on_end(len(cohort.tickets))
        else:
            self._waiting.append((cohort, arrival))

    def _forward(self) -> None:
        """Run what the cohorts wait for, and let each go on until it waits again or is over."""
        begun = time.monotonic()
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        calls = [call for _, call in waiting]
        rows = sum(len(call.embeds) for call in calls)
        found = self._hidden(calls)
        now = time.monotonic()
        self._on_forward(rows, now - begun)
        for (cohort, _), hidden in zip(waiting, found, strict=True):
            cohort.reply(hidden)
            self._await()
            for ticket in cohort.tickets:
                if ticket.open and now > ticket.until:
                    ticket.end(Failed(deadline_exceeded(ticket.deadline)))

    def _hidden(self, calls: Sequence[Call]) -> Sequence[Tensor | Exception]:
        """Hidden states of every call. Where the shared pass fails, each is tried by itself, so
        that one request's fault is not everybody's."""
        try:
            return together(self.model.backbone, calls)
        except Exception as shared:
            log_error(
                _log, f"a forward of {len(calls)} canvases fails, each is tried alone", shared
            )
            found: list[Tensor | Exception] = []
            for call in calls:
                try:
                    found.append(self.model.backbone(*call))
                except Exception as error:  # the cohort that gets it tells its requests and the log
                    found.append(error)
            return found
