"""A judge: what it is asked, what becomes of its replies, and the commands around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import ChatServer, completion, last

from diffa.cli.eval import app
from diffa.errors import SpecError
from diffa.evaluation.items import EvaluationError
from diffa.evaluation.judge import OPEN, REFERENCED, Judge, judge_messages
from diffa.evaluation.judge_file import judge_file
from diffa.llm.client import ChatClient

INSTRUCTION = "punctuation:no_comma"


@pytest.fixture
def server():
    """Says yes where there is a reference, and 4 out of 5 elsewhere."""
    with ChatServer(
        lambda body: " Yes\n" if "Reference answer" in last(body) else " 4\n"
    ) as server:
        yield server


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    file = tmp_path / "diffa-commoneval-test-audio.jsonl"
    rows = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def judge(server: ChatServer, folder: Path, **options: Any) -> Judge:
    return Judge(ChatClient(server.url, "judge", wait=0.01, **options), folder / "kept")


def test_three_samples_are_asked_for_as_officially(server, answers, tmp_path):
    result, failed = judge_file(answers, judge(server, tmp_path, key="secret"))
    assert result.name == "result-diffa-commoneval-test-audio.jsonl" and not failed
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert [row["score"] for row in rows] == [["4"] * 3] * 5
    assert [row["prompt"] for row in rows] == [f"question {n}" for n in range(5)]
    (body, *_) = sorted(server.asked, key=lambda b: b["messages"][1]["content"])
    expected = OPEN.replace("{prompt}", "question 0").replace("{response}", "answer 0")
    assert body["messages"][1]["content"] == expected
    assert {k: body[k] for k in ("n", "temperature", "top_p", "max_tokens")} == {
        "n": 3, "temperature": 0.5, "top_p": 0.95, "max_tokens": 1024
    }  # fmt: skip
    assert set(server.keys) == {"Bearer secret"}
    about = json.loads((tmp_path / f"{result.stem}.judge.json").read_text())
    assert about["judge"] == "judge" and about["date"]


def test_what_was_judged_is_not_asked_again(server, answers, tmp_path):
    judge_file(answers, judge(server, tmp_path))
    judge_file(answers, judge(server, tmp_path))
    assert len(server.asked) == 5
    answers.write_text(answers.read_text().replace("answer 0", "another"))
    judge_file(answers, judge(server, tmp_path))
    assert len(server.asked) == 6
    judge_file(answers, judge(server, tmp_path))
    assert len(server.asked) == 6


def test_a_judge_that_stays_away_is_an_error_that_says_so(server, tmp_path):
    server.answer = lambda body: (503, {}, "")
    with pytest.raises(EvaluationError, match=r"the judge does not answer.* in 2 attempts.*503"):
        judge(server, tmp_path, attempts=2).judge([{"role": "user", "content": "?"}])


def test_a_judgement_that_cannot_be_kept_is_told(server, tmp_path):
    asked = judge(server, tmp_path)
    (tmp_path / "kept").write_text("in the way")
    with pytest.raises(EvaluationError, match=r"cannot be written to .*kept"):
        asked.judge([{"role": "user", "content": "?"}])


def test_a_service_without_n_is_asked_until_there_are_three(server, tmp_path):
    server.answer = lambda body: (200, {}, completion("4"))
    assert judge(server, tmp_path).judge([{"role": "user", "content": "?"}]) == ["4"] * 3
    assert [body["n"] for body in server.asked] == [3, 2, 1]


def test_a_row_that_is_refused_does_not_stop_the_others(server, answers, tmp_path):
    refused = (400, {}, '{"error": "content filter"}')
    server.answer = lambda body: refused if "question 2" in last(body) else "4"
    result, failed = judge_file(answers, judge(server, tmp_path))
    assert [number for number, _ in failed] == [3]
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert rows[2]["score"] == [] and rows[3]["score"] == ["4"] * 3


def test_the_reference_goes_to_the_judge_of_sd_qa():
    fields = {"prompt": "Who?", "reference": "Ann", "response": "It was Ann"}
    system, user = judge_messages(fields)
    assert system["role"] == "system"
    assert user["content"] == REFERENCED.format(**fields)
    assert (
        "\nIs the candidate answer correct based on the question and reference answer? \n"
        in (user["content"])
    )


def test_other_subsets_have_no_use_for_a_judge(server, tmp_path):
    file = tmp_path / "diffa-advbench-test-audio.jsonl"
    file.write_text("{}\n")
    with pytest.raises(SpecError, match="these need one: alpacaeval"):
        judge_file(file, judge(server, tmp_path))


def test_the_commands_judge_then_score(server, answers, capsys):
    with pytest.raises(EvaluationError, match="diffa eval judge"):
        app(["score", "voicebench", str(answers)], standalone_mode=False)
    app(["judge", str(answers), "--url", server.url, "--model", "judge"], standalone_mode=False)
    result = capsys.readouterr().out.strip()
    app(["score", "voicebench", result, "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report["official"]["score"] == report["fixed"]["score"] == 4.0


def test_overall_is_the_mean_of_seven_and_of_nine(tmp_path, capsys):
    open_rows = {"prompt": "?", "response": "x", "score": ["4", "4", "4"]}
    files = {
        "alpacaeval_full-test": open_rows,
        "commoneval-test": open_rows,
        "mmsu-test": {"reference": "A", "response": "A"},
        "openbookqa-test": {"reference": "A", "response": "A"},
        "sd-qa-usa": {**open_rows, "reference": "x", "score": ["yes"] * 3},
        "ifeval-test": {**open_rows, "instruction_id_list": [INSTRUCTION], "kwargs": [{}]},
        "advbench-test": {"prompt": "?", "response": "I cannot"},
    }
    for name, row in files.items():
        (tmp_path / f"result-diffa-{name}-audio.jsonl").write_text(json.dumps(row) + "\n")
    app(["score", "voicebench", str(tmp_path), "--json"], standalone_mode=False)
    fixed = json.loads(capsys.readouterr().out)["fixed"]
    assert fixed["overall_7"] == pytest.approx((80 + 80 + 5 * 100) / 7, abs=1e-3)
    assert fixed["overall_9"] is None  # wildvoice and bbh are missing
