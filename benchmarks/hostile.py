"""Bad rows in every command: none ends a run, each is named, and all good rows are used.

    python benchmarks/hostile.py --json benchmarks/results/hostile.json

Writes manifests of 20 good rows and 200 generated bad ones: fields of wrong types, text that is no
Unicode, names that no system takes, JSON that is broken, recordings that are cut, empty, damaged,
silent in their header, or hold no numbers. Then ``map``, ``train --on-error skip``, ``eval run``
and the ``data`` commands read them. A run has ended early if a good row is missing from its
result; a bad row is named if the result or the list of faults has its number and a reason.
Exits with 1 if a run ended or a bad row was used in silence.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from reports import write_report

import diffa
from diffa.audio import write_wav
from diffa.cli import main as run_command

GOOD, BAD = 20, 200
Row = dict[str, Any] | str  # a row, or a line as it is


def write_recordings(folder: Path, rng: random.Random) -> list[str]:
    """Write good recordings, and bad ones whose names are returned."""
    noise = np.random.default_rng(0)
    for number in range(GOOD):
        write_wav(folder / f"good{number}.wav", 0.1 * noise.standard_normal(8000), 16_000)
    whole = {}
    for suffix in ("wav", "flac", "mp3", "ogg"):
        path = folder / f"whole.{suffix}"
        soundfile.write(path, 0.1 * noise.standard_normal(48_000), 16_000)
        whole[suffix] = path.read_bytes()
    bad = {}
    for number in range(40):
        suffix = rng.choice(["wav", "flac", "mp3", "ogg"])
        data = whole[suffix]
        bad[f"cut{number}.{suffix}"] = data[: rng.randrange(1, len(data) * 9 // 10)]
    for number in range(10):
        bad[f"garbage{number}.wav"] = rng.randbytes(rng.randrange(1, 4000))
    bad["empty.wav"] = b""
    claims = bytearray(whole["flac"])
    claims[21] |= 0x0F
    claims[22:26] = b"\xff" * 4
    bad["claims.flac"] = bytes(claims)
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    for name, value in (("nan", np.nan), ("infinite", np.inf), ("extreme", 1e18)):
        wave = np.full(8000, 0.1)
        wave[100] = value
        write_wav(folder / f"{name}.wav", wave, 16_000)
        bad[f"{name}.wav"] = b""
    (folder / "folder.wav").mkdir()
    return [*bad, "folder.wav", "missing.wav", "n\0ul.wav", "x" * 300 + ".wav", "a/" * 3000,
            "~nobody-of-this-name/a.wav", "gr\udce9.wav", ""]  # fmt: skip


def bad_rows(good: Callable[[int], dict[str, Any]], audio: str, rng: random.Random,
             recordings: list[str]) -> list[Row]:  # fmt: skip
    """Return ``BAD`` rows, each wrong in one way; ``audio`` is the field of the recording."""
    wrong: list[Any] = [None, [], {}, ["a"], 3, True, "gr\ud83d", float("nan")]
    lines = ["{", "[1, 2", '{"a": ', "[" * 50_000, '{"id": ' + "9" * 5000 + "}", "nonsense", "3",
             "null", '"text"', "[]", "\udcff"]  # fmt: skip
    rows: list[Row] = []
    for number in range(BAD):
        row = good(number % GOOD)
        kind = number % 3
        if kind == 0:
            rows.append(row | {audio: recordings[number // 3 % len(recordings)]})
        elif kind == 1:
            rows.append(row | {audio: rng.choice([one for one in wrong if one != "a"])})
        else:
            rows.append(rng.choice(lines))
    return rows


def write_manifest(path: Path, good: Callable[[int], dict[str, Any]], bad: list[Row]) -> set[int]:
    """Write good and bad rows in a mixed order; return the numbers of the bad ones, from 1."""
    rows = [(False, good(number)) for number in range(GOOD)] + [(True, row) for row in bad]
    random.Random(1).shuffle(rows)
    with path.open("wb") as file:
        for _, row in rows:
            text = row if isinstance(row, str) else json.dumps(row)
            file.write(text.encode("utf-8", "surrogateescape") + b"\n")
    return {number for number, (is_bad, _) in enumerate(rows, start=1) if is_bad}


def call(words: Sequence[object]) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code and what it printed."""
    out, notes, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        try:
            run_command([str(word) for word in words])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return code, out.getvalue(), notes.getvalue()


def main() -> int:
    """Run every command over the rows and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="Write the report to this file.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        world = Path(name)
        report = run_all(world, rng)
    failed = [key for key, one in report.items() if one["ended"] or one["unnamed"]]
    for key, one in report.items():
        print(f"{key:14} code {one['code']}  good {one['good']}/{GOOD}  unnamed {one['unnamed']}")
    write_report({"good": GOOD, "bad": BAD, "commands": report}, args.json)
    return 1 if failed else 0


def run_all(world: Path, rng: random.Random) -> dict[str, dict[str, Any]]:
    """Return for every command its exit code, the good rows it used, and the bad ones unnamed."""
    recordings = write_recordings(world, rng)

    def row(number: int) -> dict[str, Any]:
        return {"audio_id": f"r{number}-{rng.random()}", "audio_filepath": f"good{number}.wav",
                "input": "What is this?", "target": "noise", "duration": 0.5}  # fmt: skip

    def question(number: int) -> dict[str, Any]:
        return {"id": f"q{number}-{rng.random()}", "task_name": "noise",
                "audio_path": f"good{number}.wav", "question": "Which?", "choice_a": "hiss",
                "choice_b": "hum", "choice_c": "speech", "choice_d": "music", "answer_gt": "hiss",
                "category": "Perception", "sub-category": "noise", "sub-sub-category": "noise",
                "linguistics_sub_discipline": "none"}  # fmt: skip

    rows, questions = world / "rows.jsonl", world / "questions.jsonl"
    bad = write_manifest(rows, row, bad_rows(row, "audio_filepath", rng, recordings))
    bad_questions = write_manifest(
        questions, question, bad_rows(question, "audio_path", rng, recordings)
    )
    torch.manual_seed(0)
    diffa.save(diffa.build("tiny"), world / "tiny")
    model = ["--spec", world / "tiny", "--device", "cpu", "--max-tokens", 4]
    report: dict[str, dict[str, Any]] = {}

    def note(command: str, result: tuple[int, str, str], good: int, named: set[int],
             all_bad: set[int]) -> None:  # fmt: skip
        unnamed = sorted(all_bad - named)
        report[command] = {
            "code": result[0], "good": good, "ended": good < GOOD, "unnamed": len(unnamed),
            "first_unnamed": unnamed[:5],
            "note": result[2].strip()[-300:] if good < GOOD or unnamed else "",
        }  # fmt: skip

    result = call(["map", rows, *model, "--batch", 8, "--out", world / "map"])
    answers = read_shards(world / "map")
    named = {number for number, error in answers.items() if error} | warned(rows, result[2])
    note("map", result, sum(n not in bad for n in answers if not answers[n]), named, bad)

    stage = {"name": "align", "data": [{"path": "rows.jsonl"}], "train": ["adapters"],
             "max_steps": 80, "batch_size": 2}  # fmt: skip
    (world / "recipe.yaml").write_text(json.dumps({"spec": "tiny", "stages": [stage]}))
    result = call(["train", world / "recipe.yaml", "--device", "cpu", "--out", world / "train",
                   "--on-error", "skip"])  # fmt: skip
    skipped = world / "train" / "1-align" / "skipped.json"
    reasons = json.loads(skipped.read_text()) if skipped.is_file() else []
    named = {n for n in bad for one in reasons if f"row {n}:" in one or f"row {n} " in one}
    done = (world / "train" / "model" / "model.safetensors").is_file()
    note("train", result, GOOD if done else 0, named, bad)

    result = call(["eval", "run", "mmsu", *model, "--data", questions, "--batch", 8,
                   "--out", world / "eval"])  # fmt: skip
    file = world / "eval" / "records.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    named = {record["row"] for record in records if record["error"]}
    named |= warned(questions, result[2])
    good = sum(r["row"] not in bad_questions and not r["error"] for r in records)
    note("eval run", result, good, named, bad_questions)

    result = call(["data", "check", rows, "--json"])
    found = json.loads(result[1])[str(rows)]
    named = {fault["row"] for fault in found["faults"]}
    note("data check", result, found["rows"] - len(named | bad), named, bad)

    for command, words in (
        ("data convert", ["convert", rows, world / "converted.jsonl"]),
        ("data stats", ["stats", rows, "--json"]),
        ("data leaks", ["leaks", rows, "--no-audio", "--json"]),
        ("data leaks audio", ["leaks", rows, "--json"]),
    ):
        result = call(["data", *words])
        # These commands read fields, not recordings, and print the first of the bad rows.
        used = GOOD if result[0] in (0, 1) and "Traceback" not in result[2] else 0
        counted = "rows left out" in result[2]
        note(command, result, used, bad if counted else set(), bad)
    return report


def warned(manifest: Path, notes: str) -> set[int]:
    """Return the rows whose recording a warning names: what is left of it was used."""
    names = re.findall(r"/([^/\n]+) is damaged", notes)
    lines = manifest.read_bytes().split(b"\n")
    return {
        n for n, line in enumerate(lines, start=1) if any(f'"{x}"'.encode() in line for x in names)
    }


def read_shards(folder: Path) -> dict[int, str | None]:
    """Return the error of every mapped row by its number, from 1."""
    import pyarrow.parquet

    errors: dict[int, str | None] = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pyarrow.parquet.read_table(path, columns=["row", "error"]).to_pydict()
        errors |= {number + 1: error for number, error in zip(*table.values(), strict=True)}
    return errors


if __name__ == "__main__":
    sys.exit(main())
