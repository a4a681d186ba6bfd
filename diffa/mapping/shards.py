"""One shard: its rows answered in batches, and written completely or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffa.audio import prepare
from diffa.data.tables import import_pyarrow
from diffa.errors import DiffaError, describe_error
from diffa.evaluation.batched_model import BatchedModel, RowResult
from diffa.evaluation.items import Question
from diffa.mapping.plan import MapPlan
from diffa.mapping.rows import QuestionRow
from diffa.runtime.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.model import Model


class ShardReport(NamedTuple):
    """A finished shard: its rows, how many of them failed, and seconds of audio."""

    shard: int
    rows: int
    errors: int
    seconds: float


class ShardWriter:
    """Answers shards of a plan with one model, and writes them to a folder.

    Args:
        plan: Rows, questions and options.
        out: Folder of the shards.
        model: The model of the plan.
    """

    def __init__(self, plan: MapPlan, out: Path, model: Model) -> None:
        self.plan, self.out = plan, out
        self._model, self._rate = BatchedModel(model), model.encoder.sample_rate
        self._manifest = plan.open_manifest()

    def write(self, index: int) -> ShardReport:
        """Answer a shard and write it. Every process writes the same bytes."""
        size = self.plan.shard_size
        rows = self._manifest.read(index * size, (index + 1) * size)
        results, seconds = self._answer(rows)
        _write_parquet(self.plan, self.plan.shard_path(self.out, index), rows, results, seconds)
        errors = sum(result.error is not None for result in results)
        return ShardReport(index, len(rows), errors, sum(value or 0.0 for value in seconds))

    def _answer(self, rows: Sequence[QuestionRow]) -> tuple[list[RowResult], list[float | None]]:
        """Return the result of each row, and the seconds of audio of the rows with an answer."""
        results: dict[int, RowResult] = {}
        seconds: dict[int, float] = {}
        loaded: list[tuple[QuestionRow, Tensor]] = []
        for row in rows:
            try:
                if row.fault:
                    raise DiffaError(row.fault)
                loaded.append((row, prepare(row.path, self._rate)))
            except Exception as error:  # whatever is wrong with a row is that row's error
                # Errors name the path as the manifest does: shards must not depend on folders.
                text = describe_error(error)
                text = text.replace(str(row.path), row.audio) if row.audio else text
                results[row.number] = RowResult(error=text)
        # Rows of similar length share a batch: less padding.
        loaded.sort(key=lambda pair: (len(pair[1]), pair[0].number))
        for start in range(0, len(loaded), self.plan.batch_size):
            batch = loaded[start : start + self.plan.batch_size]
            answers = self._model(
                [self._question(row) for row, _ in batch], [wave for _, wave in batch]
            )
            for (row, wave), result in zip(batch, answers, strict=True):
                results[row.number] = result
                if result.error is None:
                    seconds[row.number] = round(len(wave) / self._rate, 6)
        return [results[row.number] for row in rows], [seconds.get(row.number) for row in rows]

    def _question(self, row: QuestionRow) -> Question:
        return Question(row.question, max_tokens=self.plan.max_tokens, system=self.plan.system)


def _write_parquet(
    plan: MapPlan,
    path: Path,
    rows: Sequence[QuestionRow],
    results: Sequence[RowResult],
    seconds: Sequence[float | None],
) -> None:
    pa, parquet = import_pyarrow()
    passes = [None if result.error else result.num_forwards for result in results]
    columns = {
        "row": (pa.int64(), [row.number for row in rows]),
        "audio": (pa.string(), [row.audio for row in rows]),
        "audio_id": (pa.string(), [row.audio_id or None for row in rows]),
        "question": (pa.string(), [row.question for row in rows]),
        "text": (pa.string(), [result.text for result in results]),
        "tokens": (pa.list_(pa.int32()), [result.tokens for result in results]),
        "num_forwards": (pa.int32(), passes),
        "seconds": (pa.float64(), seconds),
        "error": (pa.string(), [result.error for result in results]),
    }
    schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()])
    schema = schema.with_metadata({"diffa.manifest": plan.digest})
    arrays = [pa.array(values, kind) for kind, values in columns.values()]
    # An open file: pyarrow takes names such as ~x and http:x for something else.
    with atomic_write(path) as draft, draft.open("wb") as file:
        parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), file)
