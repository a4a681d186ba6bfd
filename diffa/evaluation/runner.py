"""Run a benchmark: in batches, resumable, on any number of processes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffa.errors import SpecError, describe_error, suggest
from diffa.evaluation.batches import BatchRow, make_batches, unfinished_batches
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.items import EvaluationError, Item, Mode, Question, Suite
from diffa.evaluation.records import RECORDS, SCORES, TIMES, RunFolder
from diffa.evaluation.scores import score_items

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.evaluation.batched_model import RowResult
    from diffa.model import Model


class EvalConfig(NamedTuple):
    """How a benchmark is run.

    Attributes:
        prompt: Id of a prompt of the suite. Default: its first.
        mode: Generate answers, or take the choice of highest likelihood.
        batch_size: Maximum number of rows per batch. It does not change answers.
        batch_seconds: Maximum seconds of audio per batch, padding included.
        max_tokens: Answer length. Default: the papers' length for the benchmark.
        block_length: Block length. Default: the papers' length for the benchmark.
        num_samples: Draws per choice of several tokens, for likelihoods.
        seed: Random seed of random fallbacks, likelihood draws and the bootstrap.
        limit: Ask only the first rows. Default: all.
        rank, world_size: This process answers every ``world_size``-th batch from ``rank`` on.
    """

    prompt: str = ""
    mode: Mode = "generate"
    batch_size: int = 16
    batch_seconds: float = 480.0
    max_tokens: int | None = None
    block_length: int | None = None
    num_samples: int = 128
    seed: int = 0
    limit: int | None = None
    rank: int = 0
    world_size: int = 1


class EvalProgress(NamedTuple):
    """Rows answered of this process's share, rows answered in this run, and its seconds."""

    done: int
    total: int
    fresh: int
    seconds: float

    def __str__(self) -> str:
        rate = self.fresh / self.seconds if self.seconds else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        return f"{self.done}/{self.total} rows, {rate:.2f} rows/s, {left:.0f} s left"


def evaluate(
    model: Model,
    suite: Suite,
    data: BenchmarkData,
    out: str | Path,
    config: EvalConfig | None = None,
    *,
    on_progress: Callable[[EvalProgress], None] | None = None,
) -> dict[str, Any] | None:
    """Ask, record and score; continue where an earlier run with the same options stopped.

    A resumed run and several processes write the same ``records.jsonl``, byte for byte, as one
    undisturbed process.

    Returns:
        The report of ``score_items``, or None while other processes have rows to answer.

    Raises:
        EvaluationError: The folder holds another run, or another process writes into it.
        SpecError: The suite or the model does not have an option of ``config``.
    """
    config = config or EvalConfig()
    config = config._replace(prompt=config.prompt or suite.prompts[0])
    _check_config(suite, config)
    # The header names data, spec and options: another value of any of them is another run.
    items = data.items[: config.limit]
    folder = RunFolder(out, config.rank)
    header = _run_header(model, suite, data, items, config)
    with folder.locked():
        folder.write_header(header)
        # A killed process may have left half a line; its row is answered again.
        folder.truncate_partial_lines()
        return _run_share(model, suite, data, items, folder, config, header, on_progress)


def _run_share(
    model: Model,
    suite: Suite,
    data: BenchmarkData,
    items: Sequence[Item],
    folder: RunFolder,
    config: EvalConfig,
    header: dict[str, Any],
    on_progress: Callable[[EvalProgress], None] | None,
) -> dict[str, Any] | None:
    """Answer this process's share of the items; score all if the others are done."""
    rows = [
        BatchRow(item.number, question, data.duration(item.number))
        for item in items
        if (question := _question(suite, item, config)) is not None
    ]
    batches = make_batches(rows, batch_size=config.batch_size, batch_seconds=config.batch_seconds)
    # Neighbouring batches cost alike, so every process gets the same amount of work.
    share = batches[config.rank :: config.world_size]
    _answer_batches(model, data, folder, share, config, on_progress)
    # The last process to finish scores the answers of all.
    answers = folder.answers()
    if any(row.number not in answers for row in rows):
        return None
    return _write_results(suite, items, answers, folder, header)


def _answer_batches(
    model: Model,
    data: BenchmarkData,
    folder: RunFolder,
    share: list[list[BatchRow]],
    config: EvalConfig,
    on_progress: Callable[[EvalProgress], None] | None,
) -> None:
    """Answer the rows of a share without an answer and append them, batch by batch."""
    from diffa.evaluation.batched_model import BatchedModel

    done = folder.answers()
    total = sum(len(batch) for batch in share)
    answered = sum(row.number in done for batch in share for row in batch)
    batched = BatchedModel(
        model, mode=config.mode, num_samples=config.num_samples, seed=config.seed
    )
    # Items may be filtered by a limit; ids are looked up by number.
    ids = {item.number: item.fields.get("id") for item in data.items}
    versions, rate = _library_versions(), model.encoder.sample_rate
    begin = last = time.perf_counter()
    load = partial(_load_waveform, data, rate=rate)
    batches = batched.answer_batches(unfinished_batches(share, done), load, config.batch_size)
    fresh = 0
    # Closing the generator ends its threads, also after an error or Ctrl-C.
    with closing(batches):
        for rows, waves, results in batches:
            now = time.perf_counter()
            seconds, last = round((now - last) / len(rows), 4), now
            records, times = [], []
            for row, wave, result in zip(rows, waves, results, strict=True):
                # Batches are formed as they were: rows keep their padding, and so their answers.
                if row.number in done:
                    continue
                length = 0.0 if isinstance(wave, str) else len(wave) / rate
                records.append(_record(row, result, ids[row.number], length, versions))
                times.append({"row": row.number, "seconds": seconds, "batch_size": len(rows)})
            folder.append(records, times)
            fresh += len(records)
            if on_progress is not None:
                elapsed = time.perf_counter() - begin
                on_progress(EvalProgress(answered + fresh, total, fresh, elapsed))


def _load_waveform(data: BenchmarkData, number: int, rate: int) -> Tensor | str:
    """Return an item's waveform (S,) at ``rate``, or what is wrong with it."""
    from diffa.audio import prepare, resample

    try:
        wave, own_rate = data.audio(number)
        return prepare(resample(wave, own_rate, rate), rate)
    except Exception as error:  # whatever is wrong with an item's audio is that item's error
        return describe_error(error)


def _record(
    row: BatchRow, result: RowResult, name: Any, seconds: float, versions: dict[str, str]
) -> dict[str, Any]:
    """Return one line of the records. Nothing in it depends on the batch or the clock."""
    return {
        "row": row.number,
        "id": name,
        "question": row.question.text,
        "response": result.text,
        "num_forwards": result.num_forwards,
        "max_tokens": row.question.max_tokens,
        "audio_seconds": round(seconds, 3),
        "error": result.error,
        "spec_digest": result.spec_digest,
        "versions": versions,
    }


def _unanswered_record(item: Item, reason: str) -> dict[str, Any]:
    """Return the record of an item that is too damaged to be asked."""
    empty = dict.fromkeys(
        ("question", "response", "max_tokens", "audio_seconds", "spec_digest", "versions")
    )
    return {
        "row": item.number,
        "id": item.fields.get("id"),
        **empty,
        "num_forwards": 0,
        "error": reason,
    }


def _write_results(
    suite: Suite,
    items: Sequence[Item],
    answers: dict[int, dict[str, Any]],
    folder: RunFolder,
    header: dict[str, Any],
) -> dict[str, Any]:
    """Write records, official files and scores from all answers; return the report."""
    answered = []
    for item in items:
        response = answers.get(item.number, {}).get("response") or ""
        fields = suite.answered_fields(item.fields, response, header["prompt"])
        answered.append(item._replace(fields=fields))
    report, scores = score_items(suite, answered, seed=header["seed"])
    records = []
    for item, score in zip(items, scores, strict=True):
        record = answers.get(item.number) or _unanswered_record(
            item, item.fault or suite.find_fault(item.fields)
        )
        by_parser = {name: value._asdict() for name, value in score.items()}
        records.append({**record, "scores": by_parser})
    times = folder.times()
    report |= _run_report(header, records, times)
    folder.write(RECORDS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    folder.write(TIMES, "".join(json.dumps(line) + "\n" for line in times))
    for name, text in suite.export(answered, f"{suite.name}-predictions").items():
        folder.write(name, text)
    folder.write(SCORES, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _run_report(
    header: dict[str, Any], records: list[dict[str, Any]], times: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what a report says of a run besides scores: errors, versions, durations, passes."""
    copied = ("data", "data_digest", "prompt", "mode", "spec_digest", "device", "dtype", "versions")
    lengths = [record["audio_seconds"] or 0 for record in records]
    audio, seconds = sum(lengths), sum(line["seconds"] for line in times)
    return {
        "failed": [
            {"row": r["row"], "reason": r["error"]} for r in records if r["error"] is not None
        ],
        **{name: header[name] for name in copied},
        "over_30_s": sum(length > 30 for length in lengths),
        "seconds": round(seconds, 3),
        "audio_seconds": round(audio, 3),
        "real_time_factor": round(seconds / audio, 4) if audio else None,
        "num_forwards": sum(record["num_forwards"] for record in records),
    }


def _run_header(
    model: Model, suite: Suite, data: BenchmarkData, items: Sequence[Item], config: EvalConfig
) -> dict[str, Any]:
    """Return everything that the answers depend on, and nothing else."""
    text = json.dumps([item.fields for item in items], sort_keys=True, default=str)
    options = config._asdict()
    for name in ("batch_size", "batch_seconds", "rank", "world_size"):
        del options[name]
    return {
        "suite": suite.name,
        **({"subset": suite.subset} if suite.subset else {}),
        "data": data.path.name,
        "rows": len(items),
        "data_digest": hashlib.sha256(text.encode()).hexdigest()[:12],
        **options,
        "parsers": dict(suite.parsers),
        "spec_digest": model.spec.digest(),
        "spec": json.loads(model.spec.to_json()),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": _library_versions(),
    }


def _library_versions() -> dict[str, str]:
    import torch
    import transformers

    import diffa

    modules = (diffa, torch, transformers)
    return {module.__name__: module.__version__ for module in modules}


def _question(suite: Suite, item: Item, config: EvalConfig) -> Question | None:
    """Return an item's question with the lengths of ``config``; None if it cannot be asked."""
    if item.fault or suite.find_fault(item.fields):
        return None
    question = suite.question(item.fields, config.prompt)
    return question._replace(
        max_tokens=config.max_tokens or question.max_tokens,
        block_length=config.block_length or question.block_length,
    )


def _check_config(suite: Suite, config: EvalConfig) -> None:
    if config.prompt not in suite.prompts:
        near = suggest(config.prompt, suite.prompts)
        raise SpecError(f"{suite.name} has no prompt {config.prompt!r}{near}")
    if config.batch_size < 1 or config.batch_seconds <= 0 or (config.limit or 1) < 1:
        raise SpecError("batch, budget and limit must be above 0")
    if not 0 <= config.rank < config.world_size:
        raise SpecError(f"rank {config.rank} is not one of {config.world_size} processes")
    if config.mode not in ("generate", "likelihood"):
        raise EvaluationError(f"mode is 'generate' or 'likelihood', got {config.mode!r}")
