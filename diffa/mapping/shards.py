"""One shard: its rows answered in batches, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffa.audio import prepare
from diffa.errors import DiffaError
from diffa.mapping.plan import Plan
from diffa.mapping.rows import Row
from diffa.runtime.files import atomic_write


class Written(NamedTuple):
    """A finished shard: rows, those with an error among them, and seconds of audio."""

    shard: int
    rows: int
    errors: int
    seconds: float


class Found(NamedTuple):
    """What became of a row; ``error`` is None where there is an answer."""

    text: str | None = None
    tokens: list[int] | None = None
    num_forwards: int | None = None
    seconds: float | None = None
    error: str | None = None


class Writer:
    """Answers shards of a plan with one model, and writes them under ``out``."""

    def __init__(self, plan: Plan, out: Path, model: Any) -> None:
        self.plan, self.out, self.model = plan, out, model
        self.asking = plan.asking()

    def write(self, index: int) -> Written:
        """Answer a shard and write it; the same bytes whoever does it, and however often."""
        plan = self.plan
        rows = self.asking.read(index * plan.shard, (index + 1) * plan.shard)
        found = self.answer(rows)
        write_parquet(plan.place(self.out, index), rows, found, plan)
        errors = sum(one.error is not None for one in found)
        return Written(index, len(rows), errors, sum(one.seconds or 0.0 for one in found))

    def answer(self, rows: Sequence[Row]) -> list[Found]:
        """Answer rows, those of similar length together."""
        found: dict[int, Found] = {}
        ready: list[tuple[Row, Any]] = []
        rate = self.model.encoder.sample_rate
        for row in rows:
            if row.fault:
                found[row.number] = Found(error=row.fault)
                continue
            try:
                ready.append((row, prepare(row.path, rate)))
            except DiffaError as error:
                # The path is said as the manifest writes it: shards do not depend on folders.
                found[row.number] = Found(error=str(error).replace(str(row.path), row.audio))
        ready.sort(key=lambda pair: (len(pair[1]), pair[0].number))
        for start in range(0, len(ready), self.plan.batch):
            found |= self._together(ready[start : start + self.plan.batch])
        return [found[row.number] for row in rows]

    def _together(self, part: Sequence[tuple[Row, Any]]) -> dict[int, Found]:
        """Answer a batch; where it does not fit, each row by itself, so that one that cannot be
        answered costs the others nothing."""
        try:
            return self._batch(part)
        except DiffaError as error:
            if len(part) == 1:
                return {part[0][0].number: Found(error=str(error))}
            found: dict[int, Found] = {}
            for pair in part:
                found |= self._together([pair])
            return found

    def _batch(self, part: Sequence[tuple[Row, Any]]) -> dict[int, Found]:
        model, plan = self.model, self.plan
        chat = model.chat_format
        prompts = [chat.encode(row.question, system=plan.system) for row, _ in part]
        num_forwards, step = torch.ones(len(part), dtype=torch.long), None
        for step in model.stream(
            [prompt.tokens for prompt in prompts],
            [wave for _, wave in part],
            audio_at=[prompt.audio_at or 0 for prompt in prompts],
            max_tokens=plan.max_tokens,
        ):
            num_forwards += (~step.final.all(dim=1)).long().cpu()
        made: dict[int, Found] = {}
        tokens = [] if step is None else list(step.tokens.cpu())
        for index, (row, wave) in enumerate(part):
            ids, seconds = tokens[index], round(len(wave) / model.encoder.sample_rate, 6)
            text = chat.decode(ids)
            made[row.number] = Found(text, ids.tolist(), int(num_forwards[index]), seconds)
        return made


def write_parquet(path: Path, rows: Sequence[Row], found: Sequence[Found], plan: Plan) -> None:
    """Write a shard's file; it appears under its name when it is complete and on the disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "row": (pa.int64(), [row.number for row in rows]),
        "audio": (pa.string(), [row.audio for row in rows]),
        "audio_id": (pa.string(), [row.name or None for row in rows]),
        "question": (pa.string(), [row.question for row in rows]),
        "text": (pa.string(), [one.text for one in found]),
        "tokens": (pa.list_(pa.int32()), [one.tokens for one in found]),
        "num_forwards": (pa.int32(), [one.num_forwards for one in found]),
        "seconds": (pa.float64(), [one.seconds for one in found]),
        "error": (pa.string(), [one.error for one in found]),
    }
    schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()])
    schema = schema.with_metadata({"diffa.manifest": plan.digest})
    arrays = [pa.array(values, kind) for kind, values in columns.values()]
    with atomic_write(path) as draft:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), draft)
