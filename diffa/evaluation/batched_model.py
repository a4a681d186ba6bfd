"""Put questions to a model in batches; what fails is taken apart until one row is to blame."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.build import swap
from diffa.errors import DiffaError, SpecError
from diffa.evaluation.batches import Clip
from diffa.evaluation.items import Question
from diffa.runtime.threads import single_core
from diffa.spec.schema import read_schema
from diffa.types import Step

# Rows that are worth a core of their own. Small matrices do not keep two cores busy: two threads
# with 8 rows of nano each take three quarters of the time of 16 rows on both cores.
_ROWS = 4


class Asked(NamedTuple):
    """What a row was answered: text or an error, passes it took part in, the spec's digest."""

    raw: str | None
    num_forwards: int
    error: str | None
    spec: str


class Answered(NamedTuple):
    """A batch with its waves (text says why there is none) and its answers."""

    batch: list[Clip]
    waves: list[Tensor | str]
    answers: list[Asked]


def _ended(
    batch: list[Clip], waves: list[Tensor | str], parts: list[Future[list[Asked]]]
) -> Answered:
    return Answered(batch, waves, [answer for part in parts for answer in part.result()])


class Asking:
    """Asks one model, with the block that each question wants.

    Args:
        model: any whose backbone has a tokenizer.
        mode: ``generate``, or ``likelihood``: the choice that the model finds likeliest.
        samples, seed: of the likelihoods of choices of several tokens.
    """

    def __init__(self, model: Any, *, mode: str, samples: int, seed: int) -> None:
        self.model, self.mode, self.samples, self.seed = model, mode, samples, seed
        self._models: dict[int | None, Any] = {}

    def through(
        self, batches: Iterable[list[Clip]], hear: Callable[[int], Tensor | str], most: int
    ) -> Generator[Answered, None, None]:
        """Answer batches of at most ``most`` rows in their order; ``hear`` gives a row's wave.

        On a CPU with several cores the rows of a batch are divided over threads with a core each,
        and the next batch is read while they work.
        """
        cores = torch.get_num_threads()
        wide = self.mode == "generate" and self.model.device.type == "cpu"
        workers = min(cores, most // _ROWS) if wide else 1
        if workers > 1:
            yield from self._beside(batches, hear, workers, cores)
            return
        for batch in batches:
            waves = [hear(clip.number) for clip in batch]
            yield Answered(batch, waves, self([clip.question for clip in batch], waves))

    def _beside(
        self,
        batches: Iterable[list[Clip]],
        hear: Callable[[int], Tensor | str],
        workers: int,
        cores: int,
    ) -> Generator[Answered, None, None]:
        pool = ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(cores // workers,)
        )
        begun: deque[tuple[list[Clip], list[Tensor | str], list[Future[list[Asked]]]]] = deque()
        stop = threading.Event()
        with single_core():  # the parts have the cores; threads that begin later get them all again
            try:
                for batch in batches:
                    asked, waves = [c.question for c in batch], [hear(c.number) for c in batch]
                    ends = [len(batch) * part // workers for part in range(workers + 1)]
                    parts = [
                        pool.submit(self, asked[a:b], waves[a:b], stop)
                        for a, b in pairwise(ends)
                        if a < b
                    ]
                    begun.append((batch, waves, parts))
                    if len(begun) > 1:
                        yield _ended(*begun.popleft())
                while begun:
                    yield _ended(*begun.popleft())
            finally:  # after a fault of one part, or Ctrl-C, the others end at their next step
                stop.set()
                pool.shutdown(cancel_futures=True)

    def __call__(
        self,
        questions: Sequence[Question],
        waves: Sequence[Tensor | str],
        stop: threading.Event | None = None,
    ) -> list[Asked]:
        """Answer a batch of one setting; a wave that is text says why there is none."""
        model = self.with_block(questions[0].block_length)
        name = model.spec.digest()
        sound = [i for i, wave in enumerate(waves) if not isinstance(wave, str)]
        found = self._ask(model, [questions[i] for i in sound], [waves[i] for i in sound], stop)
        made = [Asked(None, 0, str(wave), name) for wave in waves]
        for place, (raw, num_forwards, error) in zip(sound, found, strict=True):
            made[place] = Asked(raw, num_forwards, error, name)
        return made

    def with_block(self, block: int | None) -> Any:
        """The model with its sampler's block set; itself where there is none to set."""
        if block not in self._models:
            sampler = self.model.spec.data["sampler"]
            known = read_schema(type(self.model.sampler)).options
            same = (
                block is None or "block_length" not in known or sampler.get("block_length") == block
            )
            changed = {**sampler, "block_length": block}
            self._models[block] = self.model if same else swap(self.model, sampler=changed)
        return self._models[block]

    def _ask(
        self, model: Any, questions: list[Question], waves: list[Any], stop: threading.Event | None
    ) -> list[tuple[str | None, int, str | None]]:
        """Answer, or halve the batch where something in it fails or memory runs out."""
        if not questions:
            return []
        try:
            if self.mode == "likelihood":
                return [self._weigh(model, q, w) for q, w in zip(questions, waves, strict=True)]
            return self._generate(model, questions, waves, stop)
        except (DiffaError, torch.OutOfMemoryError) as error:
            if len(questions) == 1:
                return [(None, 0, str(error).partition("\n")[0])]
        half = len(questions) // 2
        return [
            *self._ask(model, questions[:half], waves[:half], stop),
            *self._ask(model, questions[half:], waves[half:], stop),
        ]

    def _generate(
        self,
        model: Any,
        questions: list[Question],
        waves: list[Any],
        stop: threading.Event | None,
    ) -> list[tuple[str | None, int, str | None]]:
        passes = Passes(len(questions), stop)
        answer = model.answer(
            waves,
            [question.text for question in questions],
            system=questions[0].system,
            max_tokens=questions[0].max_tokens,
            on_step=passes,
        )
        return [(text, count, None) for text, count in zip(answer.text, passes.counts, strict=True)]

    def _weigh(
        self, model: Any, question: Question, wave: Tensor
    ) -> tuple[str | None, int, str | None]:
        if not question.choices:
            raise SpecError("there are no choices to weigh: use --mode generate")
        found = model.score(
            wave,
            question.text,
            question.choices,
            system=question.system,
            samples=self.samples,
            seed=self.seed,
        )
        return question.choices[found.best], found.num_forwards, None


class Passes:
    """Counts each row's own passes: those until all of its tokens were final.

    Raises:
        CancelledError: from the next pass on once ``stop`` is set.
    """

    def __init__(self, rows: int, stop: threading.Event | None = None) -> None:
        self.counts, self._open, self._stop = [0] * rows, [True] * rows, stop

    def __call__(self, step: Step) -> None:
        """Note one pass."""
        if self._stop is not None and self._stop.is_set():
            raise CancelledError
        final = step.final.all(dim=1).tolist()
        for row, closed in enumerate(final):
            self.counts[row] += self._open[row]
            self._open[row] = not closed
