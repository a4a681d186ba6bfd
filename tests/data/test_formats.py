"""Rows survive every form they are written in, and what is wrong with a file is told by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from diffa.data.formats import (
    EXTRA_FIELDS,
    MANIFEST_FIELDS,
    PREFERENCE_FIELDS,
    read_rows,
    write_rows,
)
from diffa.data.manifest import Manifest
from diffa.data.messages import from_messages, to_messages
from diffa.data.samples import DataError
from diffa.data.statistics import attribute_counts, corpus_statistics
from diffa.data.validation import validate_manifest
from diffa.runtime.files import temporary_path


def a_row(folder: Path, number: int = 0, **changes: Any) -> dict[str, Any]:
    path = folder / "audio" / f"{number}.wav"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        soundfile.write(path, np.full(8000, 0.1 + number / 100, dtype=np.float32), 16_000)
    return {
        "audio_id": f"clip-{number}",
        "audio_filepath": str(path),
        "transcription": "grüß dich",
        "input": "What can you hear?",
        "target": f"A man says “grüß dich”, number {number}.",
        "dataset": "toy",
        "duration": 0.5,
        "seed_transcript": "[00:00-00:01] grüß dich (Gender: male)",
        "speaker": "anna",
        "split": "train",
        "attributes": {"gender": "male", "text": "grüß dich"},
        "measures": {"pitch": 120.5},
    } | changes


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_come_back_as_they_were(tmp_path: Path, name: str, messages: bool) -> None:
    rows = [a_row(tmp_path, 0), a_row(tmp_path, 1, attributes={"age": "23"}, measures={})]
    write_rows(tmp_path / name, rows, messages=messages)
    found, faults = read_rows(tmp_path / name)
    assert (found, faults) == (rows, [])


def test_published_json_holds_the_published_keys_in_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.json", [a_row(tmp_path)])
    (row,) = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert tuple(row) == MANIFEST_FIELDS
    preference = dict(zip(PREFERENCE_FIELDS, ("right", "wrong", "because", "labels"), strict=True))
    write_rows(tmp_path / "b.json", [a_row(tmp_path) | preference])
    (row,) = json.loads((tmp_path / "b.json").read_text("utf-8"))
    assert tuple(row) == (*MANIFEST_FIELDS, *PREFERENCE_FIELDS)


def test_audio_below_the_manifest_moves_with_it(tmp_path: Path) -> None:
    home = tmp_path / "here"
    home.mkdir()
    write_rows(home / "a.json", [a_row(home)])
    home.rename(tmp_path / "there")
    assert (
        json.loads((tmp_path / "there" / "a.json").read_text("utf-8"))[0]["audio_filepath"]
        == "audio/0.wav"
    )
    assert len(Manifest(tmp_path / "there" / "a.json")) == 1  # what training reads
    assert validate_manifest(tmp_path / "there" / "a.json").faults == []


def test_messages_are_what_other_trainers_read(tmp_path: Path) -> None:
    row = a_row(tmp_path) | {"chosen": "yes", "rejected": "no", "target": "yes"}
    made = to_messages(row, system="Listen.")
    assert [turn["role"] for turn in made["messages"]] == ["system", "user", "assistant"]
    assert made["messages"][1]["content"] == "<audio>What can you hear?"
    assert made["audios"] == [row["audio_filepath"]]
    assert made["rejected_response"] == "no"
    assert from_messages(made) == row


def test_other_trainers_rows_are_read() -> None:
    turns = [{"from": "human", "value": "<audio>\nWhat?"}, {"from": "gpt", "value": "Rain."}]
    found = from_messages({"messages": turns, "audios": [{"path": "a.wav"}]})
    assert found == {"input": "What?", "target": "Rain.", "audio_filepath": "a.wav"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "conversation of nobody"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "user, user"),
        ({"messages": "hello"}, "not a list"),
        ({"messages": [{"role": "user"}]}, "without role or without text"),
        (
            {
                "messages": [
                    {"role": "user", "content": "<audio><audio>?"},
                    {"role": "assistant", "content": "x"},
                ],
                "audios": ["a", "b"],
            },
            "2 recordings",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": "x"},
                ],
                "audios": ["a"],
            },
            "1 recordings but 0",
        ),
    ],
)
def test_conversations_that_do_not_fit_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        from_messages(row)


def test_bad_rows_are_told_by_number_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    good = json.dumps(a_row(tmp_path))
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n[1, 2]\nnonsense\n{json.dumps({'messages': []})}\n{good}\n", "utf-8")
    rows, faults = read_rows(path)
    assert len(rows) == 2 and [fault.row for fault in faults] == [2, 3, 4]


def test_files_that_cannot_be_read_or_written_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no readable Parquet"):
        read_rows(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="must end in"):
        write_rows(tmp_path / "a.csv", [])


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [a_row(tmp_path)])
    before = path.read_bytes()
    temporary_path(path).mkdir()  # nothing can be written beside it
    with pytest.raises(DataError, match="cannot be written"):
        write_rows(path, [])
    assert path.read_bytes() == before


def test_a_manifest_is_judged_row_by_row(tmp_path: Path) -> None:
    rows = [
        a_row(tmp_path, 0),
        a_row(tmp_path, 1, target=" "),
        a_row(tmp_path, 2, audio_filepath=str(tmp_path / "gone.wav")),
        a_row(tmp_path, 0),
        a_row(tmp_path, 3, duration=0.9),
        a_row(tmp_path, 4, target="The notes say that a man speaks."),
        a_row(tmp_path, 5, rejected="no", chosen="something else"),
        a_row(tmp_path, 6, input=""),
        a_row(tmp_path, 7, target=5),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    report = validate_manifest(path)
    assert report.rows == 9
    assert {fault.row: fault.reason.partition(" ")[0] for fault in report.faults} == {
        2: "has", 3: "audio", 4: "repeats", 7: "has", 9: "has",
    }  # fmt: skip
    assert {warning.row for warning in report.warnings} == {5, 6, 8}


def test_a_shared_id_is_warned_of_and_an_empty_file_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [a_row(tmp_path, 0), a_row(tmp_path, 0, input="What else?")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    report = validate_manifest(path)
    assert report.faults == []
    (warning,) = report.warnings
    assert warning.row == 2 and "audio_id of row 1" in warning.reason
    path.write_text("\n")
    with pytest.raises(DataError, match=r"a.jsonl holds no row"):
        validate_manifest(path)


def test_long_recordings_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(8000 * 31, dtype=np.float32), 8000)
    write_rows(tmp_path / "a.json", [a_row(tmp_path, audio_filepath=str(path), duration=31.0)])
    (warning,) = validate_manifest(tmp_path / "a.json").warnings
    assert "31.0 s long" in warning.reason


def test_the_table_counts_rows_clips_and_hours(tmp_path: Path) -> None:
    rows = [a_row(tmp_path, n, duration=1800.0, dataset=("a", "b")[n == 2]) for n in (0, 0, 1, 2)]
    first, second, total = corpus_statistics(rows)
    assert (first.dataset, first.rows, first.clips, first.hours) == ("a", 3, 2, 1.5)
    assert (second.dataset, second.rows, total.rows, total.hours) == ("b", 1, 4, 2.0)
    assert first.attributes == ("gender", "text")
    assert attribute_counts(rows) == {"gender": {"male": 4}}


def test_extra_fields_are_the_only_ones_besides_the_published(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [a_row(tmp_path) | {"transcribed_by": "nano", "secret": "x"}])
    row = json.loads((tmp_path / "a.jsonl").read_text("utf-8"))
    assert set(row) == {*MANIFEST_FIELDS, *EXTRA_FIELDS}
