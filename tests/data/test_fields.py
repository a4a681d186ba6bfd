"""The types of a manifest's fields, and rows of other forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from diffa.data.fields import field_fault
from diffa.data.formats import read_rows, write_rows
from diffa.data.manifest import Manifest
from diffa.data.messages import to_manifest_row
from diffa.data.samples import DataError
from diffa.data.validation import validate_manifest
from diffa.mapping.rows import QuestionManifest

BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ["What?"]}, "input that is not text but list"),
    ({"target": 3}, "target that is not text"),
    ({"transcription": {}}, "transcription that is not text"),
    ({"input": "caf\ud83d"}, "no valid Unicode"),
    ({"attributes": {"accent": "\udce9"}}, "no valid Unicode"),
    ({"duration": float("nan")}, "no number of seconds: 'nan'"),
    ({"duration": float("inf")}, "no number of seconds"),
    ({"duration": 10**400}, "no number of seconds"),
    ({"duration": -1}, "no number of seconds"),
    ({"duration": "3"}, "no number of seconds"),
    ({"duration": True}, "no number of seconds"),
    ({"audio_filepath": "a\0.wav"}, "NUL character"),
    ({"audio_filepath": "a" * 300}, "too long"),
    ({"audio_filepath": "a/" * 3000}, "too long"),
    ({"audio_filepath": "~nobody-of-this-name/a.wav"}, "unknown user"),
    ({"audio_filepath": "caf\udce9.wav"}, "no valid Unicode"),
]


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", np.zeros(1600, dtype=np.float32), 16_000)
    return tmp_path / "a.wav"


def row(**changes: Any) -> dict[str, Any]:
    return {"audio_filepath": "a.wav", "input": "What?", "target": "three"} | changes


@pytest.mark.parametrize(("change", "message"), BAD)
def test_checking_training_and_mapping_name_the_same_bad_row(
    tmp_path: Path, wav: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in (row(), row(audio_id="b", **change))))
    (fault,) = validate_manifest(path).faults
    assert fault.row == 2 and message in fault.reason
    assert Manifest(path, on_error="skip").faults == [fault]
    good, bad = QuestionManifest(path).read(0, 2)
    assert good.fault == "" and message in bad.fault
    rows, faults = read_rows(path)
    assert len(rows) == 1 and faults == [fault]


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_any_json_value_is_judged_without_an_error(value: Any) -> None:
    assert isinstance(field_fault(value), str)
    assert isinstance(field_fault({"input": value, "duration": value, "x": value}), str)


TURNS = [{"from": "human", "value": "<sound>\nWhat?"}, {"from": "gpt", "value": "three"}]


@pytest.mark.parametrize(
    "other",
    [
        {"sound": "a.wav", "conversations": TURNS},
        {"audio": "a.wav", "conversations": TURNS},
        {"query": "<audio>What?", "response": "three", "audios": ["a.wav"]},
        {"query": "What?", "response": "three", "audio": {"path": "a.wav"}},
        {"audio_filepath": {"path": "a.wav"}, "input": "What?", "target": "three"},
        {"audio": {"path": "a.wav", "bytes": None}, "input": "What?", "target": "three"},
    ],
)
def test_rows_of_other_forms_become_rows_of_the_published_one(other: dict[str, Any]) -> None:
    assert to_manifest_row(other) == row()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"source": "a.wav", "key": "b"}, r"form that is not known \(its fields: key, source\)"),
        ({}, "its fields: none"),
        ({"audio_filepath": "", "input": "", "target": ""}, "is blank"),
        ({"conversations": "hello"}, "not a list of turns"),
        ({"query": 3, "response": "x"}, "without role or without text"),
        ({"audio_filepath": {"file": "a"}, "input": "What?"}, "names no file"),
    ],
)
def test_unknown_and_blank_rows_are_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_manifest_row(other)


def test_embedded_audio_is_written_to_files(tmp_path: Path, wav: Path) -> None:
    wave = np.linspace(-0.5, 0.5, 800, dtype=np.float32)
    embedded = [
        {"audio": {"array": wave.tolist(), "sampling_rate": 8000}, "input": "Q", "target": "A"},
        {"audio": {"bytes": wav.read_bytes()}, "input": "Q", "target": "B"},
    ]
    out = write_rows(tmp_path / "out.jsonl", [to_manifest_row(one) for one in embedded])
    rows, faults = read_rows(out)
    assert faults == [] and json.loads(out.read_text().splitlines()[0])["audio_filepath"] == (
        "out-audio/000001.wav"
    )
    found, rate = soundfile.read(rows[0]["audio_filepath"], dtype="float32")
    assert rate == 8000 and np.allclose(found, wave, atol=1e-7)
    assert soundfile.info(rows[1]["audio_filepath"]).frames == 1600


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_marks_line_ends_and_separators_change_nothing(
    tmp_path: Path, wav: Path, suffix: str, ending: str
) -> None:
    rows = [row(input="one\u2028two"), row(target="four\u0085")]
    texts = [json.dumps(one, ensure_ascii=False) for one in rows]
    text = f"[{','.join(texts)}]" if suffix == ".json" else ending.join(texts)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + (text + ending).encode())
    found, faults = read_rows(path)
    assert faults == [] and [one["input"] for one in found] == ["one\u2028two", "What?"]
    assert [sample.question for sample in map(Manifest(path).__getitem__, (0, 1))] == [
        "one\u2028two", "What?",
    ]  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n\n", b"\xef\xbb\xbf\r\n"])
def test_an_empty_manifest_holds_no_row(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(DataError, match="no row"):
        validate_manifest(tmp_path / "rows.jsonl")
