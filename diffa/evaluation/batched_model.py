"""Ask a model in batches; a batch that fails is halved until only the row at fault has an error."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffa.build import swap
from diffa.errors import SpecError, describe_error
from diffa.evaluation.batches import BatchRow
from diffa.evaluation.items import Mode, Question
from diffa.runtime.threads import single_core
from diffa.spec.schema import read_schema
from diffa.types import Step

if TYPE_CHECKING:
    from diffa.model import Model

# Rows per core that make a thread worth its while. Small matrices do not keep two cores busy: two
# threads with 8 rows of nano each take three quarters of the time of 16 rows on both cores.
_ROWS_PER_CORE = 4

Wave = Tensor | str
"""A waveform (S,), or the reason why there is none."""


class RowResult(NamedTuple):
    """The answer to one row of a batch, or the error that prevented it.

    Attributes:
        text: The answer; None if there is an error.
        tokens: Its token ids; None in likelihood mode and if there is an error.
        num_forwards: Forward passes until all tokens of the row were final.
        error: One line; None if there is an answer.
        spec_digest: Digest of the spec that answered.
    """

    text: str | None = None
    tokens: list[int] | None = None
    num_forwards: int = 0
    error: str | None = None
    spec_digest: str = ""


class AnsweredBatch(NamedTuple):
    """A batch with its waveforms and results."""

    rows: list[BatchRow]
    waves: list[Wave]
    results: list[RowResult]


class BatchedModel:
    """Answers batches of questions, each with the block length that its questions want.

    Args:
        model: A model whose backbone has a tokenizer.
        mode: ``generate`` an answer, or choose the one of highest ``likelihood``.
        num_samples: Draws per choice of several tokens, for likelihoods.
        seed: Random seed of these draws.
    """

    def __init__(
        self, model: Model, *, mode: Mode = "generate", num_samples: int = 128, seed: int = 0
    ) -> None:
        self.model, self.mode, self.num_samples, self.seed = model, mode, num_samples, seed
        self._models: dict[int | None, Model] = {}

    def answer_batches(
        self,
        batches: Iterable[list[BatchRow]],
        load_waveform: Callable[[int], Wave],
        batch_size: int,
    ) -> Generator[AnsweredBatch, None, None]:
        """Answer batches of at most ``batch_size`` rows in their order.

        On a CPU with several cores the rows of a batch are divided over threads with one core
        each, and the next batch is loaded meanwhile.

        Args:
            batches: Batches whose rows share their options.
            load_waveform: Returns the waveform of an item by its number.
            batch_size: Rows of the largest batch.
        """
        cores = torch.get_num_threads()
        parallel = self.mode == "generate" and self.model.device.type == "cpu"
        workers = min(cores, batch_size // _ROWS_PER_CORE) if parallel else 1
        if workers > 1:
            yield from self._answer_parallel(batches, load_waveform, workers, cores)
            return
        for rows in batches:
            waves = [load_waveform(row.number) for row in rows]
            yield AnsweredBatch(rows, waves, self([row.question for row in rows], waves))

    def __call__(
        self,
        questions: Sequence[Question],
        waves: Sequence[Wave],
        stop: threading.Event | None = None,
    ) -> list[RowResult]:
        """Answer one batch; a row without a waveform gets the reason as its error.

        Raises:
            CancelledError: ``stop`` was set while the batch was decoded.
        """
        model = self.with_block_length(questions[0].block_length)
        rows = [
            (question, wave)
            for question, wave in zip(questions, waves, strict=True)
            if not isinstance(wave, str)
        ]
        answers = iter(self._answer(model, rows, stop))
        results = (
            RowResult(error=wave) if isinstance(wave, str) else next(answers) for wave in waves
        )
        digest = model.spec.digest()
        return [result._replace(spec_digest=digest) for result in results]

    def with_block_length(self, block_length: int | None) -> Model:
        """Return the model with this block length; unchanged if its sampler has none."""
        if block_length not in self._models:
            sampler = self.model.spec.data["sampler"]
            known = read_schema(type(self.model.sampler)).options
            same = (
                block_length is None
                or "block_length" not in known
                or sampler.get("block_length") == block_length
            )
            self._models[block_length] = (
                self.model
                if same
                else swap(self.model, sampler={**sampler, "block_length": block_length})
            )
        return self._models[block_length]

    def _answer_parallel(
        self,
        batches: Iterable[list[BatchRow]],
        load_waveform: Callable[[int], Wave],
        workers: int,
        cores: int,
    ) -> Generator[AnsweredBatch, None, None]:
        pool = ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(cores // workers,)
        )
        running: deque[tuple[list[BatchRow], list[Wave], list[Future[list[RowResult]]]]] = deque()
        stop = threading.Event()

        def oldest() -> AnsweredBatch:
            rows, waves, futures = running.popleft()
            return AnsweredBatch(rows, waves, [r for future in futures for r in future.result()])

        # The pool's threads own the cores. single_core() restores the count for later threads.
        with single_core():
            try:
                for rows in batches:
                    questions = [row.question for row in rows]
                    waves = [load_waveform(row.number) for row in rows]
                    ends = [len(rows) * part // workers for part in range(workers + 1)]
                    futures = [
                        pool.submit(self, questions[a:b], waves[a:b], stop)
                        for a, b in pairwise(ends)
                        if a < b
                    ]
                    running.append((rows, waves, futures))
                    # Two batches in flight: one is decoded while the next one's audio is loaded.
                    if len(running) > 1:
                        yield oldest()
                while running:
                    yield oldest()
            finally:  # after an error or Ctrl-C, the other threads end at their next pass
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _answer(
        self, model: Model, rows: list[tuple[Question, Tensor]], stop: threading.Event | None
    ) -> list[RowResult]:
        """Answer rows; if memory runs out or a row is bad, answer the halves."""
        if not rows:
            return []
        try:
            if self.mode == "likelihood":
                return [self._most_likely(model, *row) for row in rows]
            return self._generate(model, rows, stop)
        except CancelledError:
            raise
        except Exception as error:  # of one row or of its size: the others are answered
            if len(rows) == 1:
                return [RowResult(error=describe_error(error))]
        half = len(rows) // 2
        return [*self._answer(model, rows[:half], stop), *self._answer(model, rows[half:], stop)]

    def _generate(
        self, model: Model, rows: list[tuple[Question, Tensor]], stop: threading.Event | None
    ) -> list[RowResult]:
        first, counter = rows[0][0], PassCounter(len(rows), stop)
        answer = model.answer(
            [wave for _, wave in rows],
            [question.text for question, _ in rows],
            system=first.system,
            max_tokens=first.max_tokens,
            trim=first.trim,
            on_step=counter,
        )
        columns = zip(answer.text, answer.tokens, counter.counts, strict=True)
        return [RowResult(text, tokens.tolist(), count) for text, tokens, count in columns]

    def _most_likely(self, model: Model, question: Question, wave: Tensor) -> RowResult:
        if not question.choices:
            raise SpecError("there are no choices to compare: use --mode generate")
        score = model.score(
            wave,
            question.text,
            question.choices,
            system=question.system,
            trim=question.trim,
            samples=self.num_samples,
            seed=self.seed,
        )
        return RowResult(question.choices[score.best], None, score.num_forwards)


class PassCounter:
    """Counts the forward passes of each row until all of its tokens are final.

    Raises:
        CancelledError: On the next pass after ``stop`` is set.
    """

    def __init__(self, num_rows: int, stop: threading.Event | None = None) -> None:
        self.counts, self._open, self._stop = [0] * num_rows, [True] * num_rows, stop

    def __call__(self, step: Step) -> None:
        """Count one pass."""
        if self._stop is not None and self._stop.is_set():
            raise CancelledError
        final = step.final.all(dim=1).tolist()
        for row, closed in enumerate(final):
            self.counts[row] += self._open[row]
            self._open[row] = not closed
