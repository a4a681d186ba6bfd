"""Ask a model every question of a benchmark: in batches, resumable, on any number of processes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from diffa.errors import DiffaError, SpecError, suggest
from diffa.evaluation.batches import Clip, batches, mine, pending
from diffa.evaluation.files import Table
from diffa.evaluation.items import EvaluationError, Question, Row, Suite
from diffa.evaluation.records import RECORDS, SCORES, TIMES, Folder
from diffa.evaluation.scores import score

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.evaluation.batched_model import Asked

Mode = Literal["generate", "likelihood"]


class Settings(NamedTuple):
    """How a benchmark is run.

    Attributes:
        prompt: id of one of the suite's prompts; its first where empty.
        mode: generate answers, or take the choice that the model finds likeliest.
        batch: rows per batch at most; it does not change answers.
        budget: seconds of audio per batch at most, padding counted.
        max_tokens, block_length: instead of the papers' answer length and block.
        samples: draws per choice of several tokens, for likelihoods.
        seed: of official random guesses, likelihoods' draws and the bootstrap.
        limit: only the first rows; all where None.
        rank, world: this process asks every ``world``-th batch from ``rank`` on.
    """

    prompt: str = ""
    mode: Mode = "generate"
    batch: int = 16
    budget: float = 480.0
    max_tokens: int | None = None
    block_length: int | None = None
    samples: int = 128
    seed: int = 0
    limit: int | None = None
    rank: int = 0
    world: int = 1


class Progress(NamedTuple):
    """Where a run stands: rows answered of all, in this process's share, and seconds so far."""

    done: int
    total: int
    fresh: int
    seconds: float

    def __str__(self) -> str:
        rate = self.fresh / self.seconds if self.seconds else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        return f"{self.done}/{self.total} rows, {rate:.2f} rows/s, {left:.0f} s left"


def run(
    model: Any,
    suite: Suite,
    table: Table,
    out: str | Path,
    settings: Settings | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any] | None:
    """Ask, record and score; goes on where an earlier run of the same settings stopped.

    A killed and resumed run writes the same ``records.jsonl``, byte for byte, as one that was
    not, and so do several processes.

    Returns:
        The report of ``score``, or None where other processes still have rows to answer.

    Raises:
        EvaluationError: the folder holds another run.
        SpecError: settings that the suite or the model does not have.
    """
    chosen = settings or Settings()
    chosen = chosen._replace(prompt=chosen.prompt or suite.prompts[0])
    _check(suite, chosen)
    rows = table.rows[: chosen.limit]
    folder = Folder(out, chosen.rank)
    head = header(model, suite, table, rows, chosen)
    folder.begin(head)
    folder.mend()
    clips = [
        Clip(row.number, question, table.seconds(row.number))
        for row in rows
        if (question := _question(suite, row, chosen)) is not None
    ]
    every = batches(clips, most=chosen.batch, budget=chosen.budget)
    _answer(model, table, folder, mine(every, chosen.rank, chosen.world), chosen, on_progress)
    done = folder.done()
    if any(clip.number not in done for clip in clips):
        return None
    return finish(suite, rows, done, folder, head)


def finish(
    suite: Suite,
    rows: Sequence[Row],
    done: dict[int, dict[str, Any]],
    folder: Folder,
    head: dict[str, Any],
) -> dict[str, Any]:
    """Write records, official files and scores from all answers; return the report."""
    answered = [with_prediction(suite, row, done.get(row.number, {})) for row in rows]
    report, readings = score(suite, answered, seed=head["seed"])
    records = []
    for row, read in zip(rows, readings, strict=True):
        line = done.get(row.number) or unasked(row, row.fault or suite.check(row.fields))
        records.append({**line, "readings": {name: r._asdict() for name, r in read.items()}})
    folder.write(RECORDS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    times = folder.times()
    folder.write(TIMES, "".join(json.dumps(line) + "\n" for line in times))
    for name, text in suite.export(answered, f"{suite.name}-predictions").items():
        folder.write(name, text)
    report["failed"] = [
        {"row": r["row"], "reason": r["error"]} for r in records if r["error"] is not None
    ]
    report |= {name: head[name] for name in ("data", "data_digest", "prompt", "mode", "spec")}
    report |= {name: head[name] for name in ("device", "dtype", "versions")}
    heard, spent = sum(r["audio_seconds"] or 0 for r in records), sum(t["seconds"] for t in times)
    report["over_30_s"] = sum((r["audio_seconds"] or 0) > 30 for r in records)
    report["seconds"], report["audio_seconds"] = round(spent, 3), round(heard, 3)
    report["real_time_factor"] = round(spent / heard, 4) if heard else None
    report["num_forwards"] = sum(r["num_forwards"] for r in records)
    folder.write(SCORES, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def with_prediction(suite: Suite, row: Row, line: dict[str, Any]) -> Row:
    """A row with its answer in the suite's column; what could not be asked answers nothing."""
    return row._replace(fields={**row.fields, suite.key: line.get("raw") or ""})


def unasked(row: Row, reason: str) -> dict[str, Any]:
    """The record of a row that is too broken to be asked."""
    return {
        "row": row.number,
        "id": row.fields.get("id"),
        "question": None,
        "raw": None,
        "num_forwards": 0,
        "max_tokens": None,
        "audio_seconds": None,
        "error": reason,
        "spec": None,
        "versions": None,
    }


def header(
    model: Any, suite: Suite, table: Table, rows: Sequence[Row], settings: Settings
) -> dict[str, Any]:
    """What a run is: everything that its answers depend on, and nothing else."""
    text = json.dumps([row.fields for row in rows], sort_keys=True, default=str)
    kept = settings._asdict()
    for free in ("batch", "budget", "rank", "world"):
        del kept[free]
    return {
        "suite": suite.name,
        **({"subset": suite.subset} if hasattr(suite, "subset") else {}),
        "data": table.path.name,
        "rows": len(rows),
        "data_digest": hashlib.sha256(text.encode()).hexdigest()[:12],
        **kept,
        "parsers": dict(suite.parsers),
        "spec": model.spec.digest(),
        "spec_as_run": json.loads(model.spec.to_json()),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what answers depend on."""
    import torch
    import transformers

    import diffa

    return {
        "diffa": diffa.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _answer(
    model: Any,
    table: Table,
    folder: Folder,
    share: list[list[Clip]],
    settings: Settings,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Ask what is not answered yet and append it, batch by batch."""
    from diffa.evaluation.batched_model import Asking

    done = folder.done()
    total = sum(len(batch) for batch in share)
    left = pending(share, done)
    before = total - sum(clip.number not in done for batch in left for clip in batch)
    asking = Asking(model, mode=settings.mode, samples=settings.samples, seed=settings.seed)
    begin, fresh = time.perf_counter(), 0
    ids = {row.number: row.fields.get("id") for row in table.rows}
    noted = versions()
    rate, start = model.encoder.sample_rate, begin
    listen = partial(hear, table, rate=rate)
    with closing(asking.through(left, listen, settings.batch)) as answered:
        for batch, waves, asked in answered:
            now = time.perf_counter()
            seconds, start = (now - start) / len(batch), now
            answers, times = [], []
            for clip, one, wave in zip(batch, asked, waves, strict=True):
                if clip.number in done:
                    continue
                length = 0.0 if isinstance(wave, str) else len(wave) / rate
                answers.append(_line(clip, one, ids[clip.number], length, noted))
                times.append(
                    {"row": clip.number, "seconds": round(seconds, 4), "batch": len(batch)}
                )
            folder.append(answers, times)
            fresh += len(answers)
            if on_progress is not None:
                on_progress(Progress(before + fresh, total, fresh, time.perf_counter() - begin))


def hear(table: Table, number: int, rate: int) -> Tensor | str:
    """A row's waveform (S,) at ``rate``, or what is wrong with it."""
    from diffa.audio import prepare, resample

    try:
        wave, found = table.audio(number)
        return prepare(resample(wave, found, rate), rate)
    except DiffaError as error:
        return str(error)


def _line(
    clip: Clip, asked: Asked, name: Any, seconds: float, noted: dict[str, str]
) -> dict[str, Any]:
    """One line of the record: nothing in it depends on the batch or the clock."""
    return {
        "row": clip.number,
        "id": name,
        "question": clip.question.text,
        "raw": asked.raw,
        "num_forwards": asked.num_forwards,
        "max_tokens": clip.question.max_tokens,
        "audio_seconds": round(seconds, 3),
        "error": asked.error,
        "spec": asked.spec,
        "versions": noted,
    }


def _question(suite: Suite, row: Row, settings: Settings) -> Question | None:
    """A row's question with the settings' changes, or None where it cannot be asked."""
    if row.fault or suite.check(row.fields):
        return None
    question = suite.ask(row.fields, settings.prompt)
    return question._replace(
        max_tokens=settings.max_tokens or question.max_tokens,
        block_length=settings.block_length or question.block_length,
    )


def _check(suite: Suite, settings: Settings) -> None:
    if settings.prompt not in suite.prompts:
        near = suggest(settings.prompt, suite.prompts)
        raise SpecError(f"{suite.name} has no prompt {settings.prompt!r}{near}")
    if settings.batch < 1 or settings.budget <= 0 or (settings.limit or 1) < 1:
        raise SpecError("batch, budget and limit must be above 0")
    if not 0 <= settings.rank < settings.world:
        raise SpecError(f"rank {settings.rank} is not one of {settings.world} processes")
    if settings.mode not in ("generate", "likelihood"):
        raise EvaluationError(f"mode is 'generate' or 'likelihood', got {settings.mode!r}")
