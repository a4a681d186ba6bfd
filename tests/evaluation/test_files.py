"""Benchmarks' files that are not all well, Parquet, and the commands around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.evaluating import COUNT, records, row, write_benchmark

import diffa
from diffa.cli.eval import app
from diffa.errors import AudioError
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.items import EvaluationError
from diffa.evaluation.runner import EvalConfig, evaluate
from diffa.evaluation.suites import load_suite


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def model() -> diffa.Model:
    return diffa.build("tiny")


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(model, load_suite("mmsu"), BenchmarkData(data), out, EvalConfig(batch_size=4))
    return out


class TestFaultyFiles:
    @pytest.fixture
    def faulty(self, data: Path) -> Path:
        lines = [json.dumps(row(number)) for number in range(8)]
        lines[1] = lines[1][:40]  # cut off
        lines[2] = json.dumps({k: v for k, v in row(2).items() if k != "answer_gt"})
        lines[3] = json.dumps({**row(3), "audio_path": "audio/none.wav"})
        lines[4] = json.dumps({**row(4), "id": "item-0"})
        lines[5] = json.dumps({**row(5), "audio_path": "audio/cut.wav"})
        lines[6] = json.dumps([1, 2])
        (data.parent / "audio" / "cut.wav").write_bytes(b"RIFF\x00\x00")
        file = data.parent / "faulty.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return file

    def test_faults_are_reported_by_row_and_stay_in_the_denominator(self, model, faulty, tmp_path):
        report = evaluate(model, load_suite("mmsu"), BenchmarkData(faulty), tmp_path, EvalConfig())
        assert [fault["row"] for fault in report["invalid"]] == [2, 3, 7]
        assert [fault["row"] for fault in report["failed"]] == [2, 3, 4, 6, 7]
        assert "none.wav" in report["failed"][2]["reason"]
        assert [fault["row"] for fault in report["duplicates"]] == [5]
        assert report["items"] == report["fixed"]["total"] == 8
        assert report["official"]["total"] + report["official"]["excluded"] == 8
        assert len(records(tmp_path).splitlines()) == 8

    def test_a_list_that_breaks_off_keeps_what_can_be_read(self, model, data, tmp_path):
        file = data.parent / "list.json"
        file.write_text(json.dumps([row(0), row(1)])[:-30])
        report = evaluate(model, load_suite("mmsu"), BenchmarkData(file), tmp_path, EvalConfig())
        assert report["items"] == 2 and report["invalid"][0]["row"] == 2

    def test_a_shard_that_is_cut_off_counts_as_a_broken_row(self, data, tmp_path):
        pytest.importorskip("pyarrow")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
        with pytest.raises(EvaluationError, match="no readable Parquet"):
            BenchmarkData(tmp_path)
        (tmp_path / "b.parquet").write_bytes(b"PAR1")
        assert ["a.parquet" in row.fault for row in BenchmarkData(tmp_path).items] == [True, False]

    def test_no_rows_and_no_files_are_errors(self, tmp_path):
        with pytest.raises(EvaluationError, match=r"there is no file or folder .*none"):
            BenchmarkData(tmp_path / "none")
        (tmp_path / "empty.jsonl").write_text("")
        with pytest.raises(EvaluationError, match="has no rows"):
            BenchmarkData(tmp_path / "empty.jsonl")


def test_parquet_with_embedded_audio_gives_the_same_answers(model, data, whole, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    listed = []
    for number in range(COUNT):
        sound = (data.parent / "audio" / f"{number}.wav").read_bytes()
        fields = {k: v for k, v in row(number).items() if k != "audio_path"}
        listed.append({**fields, "audio": {"bytes": sound, "path": f"{number}.wav"}})
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(2):
        half = listed[part * COUNT // 2 : (part + 1) * COUNT // 2]
        parquet.write_table(
            arrow.Table.from_pylist(half), folder / f"train-{part}.parquet", row_group_size=4
        )
    evaluate(
        model, load_suite("mmsu"), BenchmarkData(folder), tmp_path / "out", EvalConfig(batch_size=4)
    )
    assert records(tmp_path / "out") == records(whole)


class TestCommands:
    @pytest.fixture
    def call(self, capsys):
        def call(*words: object) -> str:
            app([str(word) for word in words], standalone_mode=False)
            return capsys.readouterr().out

        return call

    def test_run_then_score_its_file_then_compare(self, call, data, tmp_path):
        outs = tmp_path / "a", tmp_path / "b"
        for out, tokens in zip(outs, (4, 2), strict=True):
            made = call("run", "mmsu", "--data", data, "--spec", "tiny", "--out", out,
                        "--limit", 6, "--max-tokens", tokens, "--json")  # fmt: skip
            report = json.loads(made)
            scored = json.loads(call("score", "mmsu", out / "mmsu-predictions.jsonl", "--json"))
            for parser in ("official", "fixed"):
                assert scored[parser] == report[parser]
        compared = json.loads(call("compare", *outs, "--json"))
        assert compared["items"] == 6 and compared["fixed"]["difference"] == pytest.approx(
            compared["fixed"]["b"] - compared["fixed"]["a"]
        )
        assert compared["header_differences"]["max_tokens"] == [4, 2]
        drawn = call("table", *outs, "--group", "category").splitlines()
        assert drawn[0] == "|  | items | a | b |" and drawn[2].startswith("| all | 6 |")
        assert [line.split(" | ")[1] for line in drawn[3:]] == ["3", "3"]

    def test_a_file_without_predictions_is_refused(self, data):
        with pytest.raises(EvaluationError, match="no row has 'response'"):
            app(["score", "mmsu", str(data)], standalone_mode=False)

    def test_transcripts_are_scored_from_two_files_of_lines(self, call, tmp_path):
        (tmp_path / "said.txt").write_text("a hello word\nb\n")
        (tmp_path / "true.txt").write_text("a hello world\nb yes\nc no\n")
        said, true = tmp_path / "said.txt", tmp_path / "true.txt"
        made = call("score", "asr", said, "--reference", true, "--json")
        report = json.loads(made)
        assert (report["official"]["errors"], report["official"]["total"]) == (2, 3)
        assert (report["fixed"]["errors"], report["fixed"]["total"]) == (3, 4)


@pytest.mark.parametrize("audio", [True, 3, [], ["a"], {"file": "a"}, {"array": "x"}, "caf\ud83d"])
def test_a_recording_of_any_type_has_no_duration_and_a_reason(tmp_path, audio):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "audio_path": audio}) + "\n")
    data = BenchmarkData(tmp_path / "rows.jsonl")
    assert data.duration(1) == 0.0
    with pytest.raises(AudioError):
        data.audio(1)
