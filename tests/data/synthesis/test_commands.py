"""``diffa data ...`` from one end to the other, on recordings made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers.chat_server import ChatServer, last
from typer.testing import CliRunner, Result

from diffa.cli import app
from diffa.errors import DiffaError, SpecError


@pytest.fixture
def fsdd(tmp_path: Path) -> Path:
    """Two digits of two speakers, each in both parts of the corpus."""
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for digit in (3, 8):
        for speaker in ("theo", "george"):
            for index in (0, 7):
                wave = draw.standard_normal(4000) * np.hanning(4000) * 0.1
                path = folder / f"{digit}_{speaker}_{index}.wav"
                soundfile.write(path, wave.astype(np.float32), 8000)
    return folder.parent


def data(*words: Any) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, words)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def manifest(fsdd: Path, tmp_path: Path) -> Path:
    made = data("manifest", "fsdd", fsdd, "--split", "train", "--out", tmp_path / "train.jsonl")
    assert made.exit_code == 0, made.output
    return tmp_path / "train.jsonl"


def test_a_corpus_becomes_a_manifest_that_passes_its_check(manifest: Path) -> None:
    rows = read(manifest)
    assert [row["target"] for row in rows] == ["three", "three", "eight", "eight"]
    assert rows[0]["audio_filepath"] == "fsdd/recordings/3_george_7.wav"
    assert rows[0]["attributes"]["accent"] == "Greek"
    checked = data("check", manifest)
    assert checked.exit_code == 0 and "4 rows, 0 unusable, 0 warnings" in checked.output


def test_corpora_are_listed_with_their_layouts() -> None:
    assert {row["name"] for row in json.loads(data("corpora", "--json").stdout)} == {
        "librispeech", "vctk", "accentdb", "iemocap", "dailytalk", "voxceleb1", "fsdd",
    }  # fmt: skip
    assert "speaker-info.txt" in data("corpora").stdout


def test_a_check_that_finds_faults_exits_with_1(manifest: Path) -> None:
    manifest.with_name("fsdd").rename(manifest.with_name("moved"))
    found = data("check", manifest, "--json")
    assert found.exit_code == 1
    (report,) = json.loads(found.stdout).values()
    assert [fault["row"] for fault in report["faults"]] == [1, 2, 3, 4]


def test_the_table_has_a_total(manifest: Path) -> None:
    found = json.loads(data("stats", manifest, "--json").stdout)
    assert [line["dataset"] for line in found["table"]] == ["FSDD", "total"]
    assert found["table"][0]["rows"] == 4 and found["values"]["gender"] == {"male": 4}
    assert "total" in data("stats", manifest).stdout


def test_leaks_between_parts_are_found_and_can_be_accepted(
    manifest: Path, fsdd: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test.jsonl"
    data("manifest", "fsdd", fsdd, "--split", "test", "--out", test, "--no-measure")
    found = data("leaks", manifest, test, "--json")
    assert found.exit_code == 1
    assert {one["kind"] for one in json.loads(found.stdout)["shared"]} == {"speaker"}
    assert data("leaks", manifest, test, "--ignore", "speaker").exit_code == 0
    assert data("leaks", manifest).exit_code == 0
    assert data("leaks", manifest, manifest, "--no-audio").exit_code == 1


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_conversion_to_messages_and_back_gives_the_rows(
    manifest: Path, tmp_path: Path, name: str
) -> None:
    assert data("convert", manifest, tmp_path / name, "--messages").exit_code == 0
    assert data("convert", tmp_path / name, tmp_path / "back.jsonl").exit_code == 0
    back, rows = read(tmp_path / "back.jsonl"), read(manifest)
    if name == "a.json":  # the published keys alone
        rows = [{key: row[key] for key in back[0]} for row in rows]
    assert back == rows


def test_captions_come_from_an_endpoint_and_are_resumed(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.json"
    with ChatServer(lambda body: f"Somebody says {last(body).split(chr(34))[1]}.") as server:
        order = ("captions", manifest, "--out", out, "--endpoint", server.url, "--model", "q")
        assert data(*order, "--sampling", "temperature=0.5").exit_code == 0
        assert data(*order, "--sampling", "temperature=0.5").exit_code == 0
    assert len(server.asked) == 4 and server.asked[0]["temperature"] == 0.5
    rows = json.loads(out.read_text("utf-8"))
    assert [row["target"] for row in rows] == [
        "Somebody says three.", "Somebody says three.", "Somebody says eight.",
        "Somebody says eight.",
    ]  # fmt: skip
    assert rows[0]["input"] == "What can you hear from the audio?"


def test_a_dead_endpoint_writes_nothing(manifest: Path, tmp_path: Path) -> None:
    with ChatServer(lambda body: (401, {}, "{}")) as server:
        order = ("--endpoint", server.url, "--model", "q", "--out", tmp_path / "a.json")
        failed = data("captions", manifest, *order)
    assert isinstance(failed.exception, DiffaError) and "refuses" in str(failed.exception)
    assert not (tmp_path / "a.json").exists()


def test_nothing_usable_is_an_error(manifest: Path, tmp_path: Path) -> None:
    with ChatServer(lambda body: "I cannot hear anything.") as server:
        order = ("--endpoint", server.url, "--model", "q", "--out", tmp_path / "a.json")
        failed = data("captions", manifest, *order)
    assert "nothing to write" in str(failed.exception)


def test_files_without_a_row_are_refused(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.jsonl").write_text("no rows here\n")
    for words in (("convert", tmp_path / "prose.jsonl", tmp_path / "a.json"),
                  ("stats", tmp_path / "prose.jsonl")):  # fmt: skip
        refused = data(*words)
        assert isinstance(refused.exception, DiffaError) and "no usable row" in str(
            refused.exception
        )
    assert not (tmp_path / "a.json").exists()
    order = ("manifest", "fsdd", manifest.parent, "--out", tmp_path / "b.json")
    refused = data(*order, "--instructions", tmp_path / "none.txt")
    assert "none.txt cannot be read" in str(refused.exception)


def test_preferences_come_from_labels_or_from_an_endpoint(manifest: Path, tmp_path: Path) -> None:
    assert data("preferences", manifest, "--out", tmp_path / "a.jsonl").exit_code == 0
    made = read(tmp_path / "a.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in made] == [
        ("three", "eight"), ("three", "eight"), ("eight", "three"), ("eight", "three"),
    ]  # fmt: skip
    assert data("check", tmp_path / "a.jsonl").exit_code == 0
    reply = json.dumps({"rejected": "nine", "explanation": "text: nine"})
    with ChatServer(lambda body: reply) as server:
        order = ("--endpoint", server.url, "--model", "q", "--no-judge", "--max-tokens", "99")
        done = data("preferences", manifest, "--out", tmp_path / "b.jsonl", *order)
    assert done.exit_code == 0, done.output
    assert {row["rejected"] for row in read(tmp_path / "b.jsonl")} == {"nine"}
    assert server.asked[0]["max_tokens"] == 99


def test_recordings_are_measured_from_the_command_line(fsdd: Path) -> None:
    (row,) = json.loads(
        data(
            "attributes", fsdd / "recordings" / "3_theo_0.wav", "--json", "--band", "volume=-9,-1"
        ).stdout
    )
    assert row["attributes"]["volume"] == "quiet" and row["duration"] == 0.5


def test_an_unknown_split_is_a_usage_error() -> None:
    refused = data("preferences", "--out", "a", "--split", "dev")
    assert refused.exit_code == 2
    assert "'dev' is not one of 'train', 'test'" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("captions", "m.jsonl", "--out", "a.json"), "name one language model"),
        (
            ("captions", "m.jsonl", "--out", "a.json", "--spec", "nano", "--local", "x"),
            "name one language model",
        ),
        (("captions", "m.jsonl", "--out", "a.json", "--endpoint", "http://127.0.0.1"), "--model"),
        (("preferences", "--out", "a.json"), "name a folder"),
        (("preferences", "--out", "a", "--local", "x"), "name one"),
        (("preferences", "m.json", "--out", "a", "--local", "x", "--endpoint", "y"), "not both"),
        (("attributes", "a.wav", "--band", "speed=fast"), "NAME=LOW,HIGH"),
        (("attributes", "a.wav", "--band", "colour=1,2"), "LOW <= HIGH"),
    ],
)
def test_options_that_exclude_each_other_are_refused_with_the_reason(
    words: tuple[str, ...], message: str
) -> None:
    refused = data(*words)
    assert isinstance(refused.exception, SpecError)
    assert message in str(refused.exception)
