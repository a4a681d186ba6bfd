"""Rows of preference data: a preferred answer and a rejected one about the same recording."""

from __future__ import annotations

from diffa.data.rows import Answering, Hearing, Row
from diffa.data.samples import DataError, Sample, seed_of


class Preferring:
    """Makes rows of two answers: the chosen one, and ``more`` with the rejected one.

    Args:
        answering: makes the row of one answer.
        hearing: reads the audio once for both, and alters it.
    """

    def __init__(self, answering: Answering, hearing: Hearing) -> None:
        self.answering, self.hearing = answering, hearing

    def __call__(self, sample: Sample, seed: int) -> Row:
        """Return a sample's row; raises DataError without a rejected answer.

        The two answers are corrupted by seeds of their own.
        """
        name = sample.key or "a sample"
        if not sample.rejected:
            raise DataError(f"{name} has no rejected answer")
        if sample.script is not None or sample.more:
            raise DataError(f"{name}: preferences are about one question and real audio")
        heard = sample._replace(audio=self.hearing(sample, seed), rate=None)
        chosen = self.answering(heard, seed)
        rejected = self.answering(heard._replace(target=sample.rejected), seed)
        apart = rejected._replace(seed=seed_of(seed, "rejected"), wave=None, spoken=None)
        return chosen._replace(more=(apart,))
