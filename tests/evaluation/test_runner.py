"""The runner: killed and resumed, in batches, in shards, in every mode."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.evaluating import COUNT, Stub, answers, records, row, write_benchmark

import diffa
from diffa.errors import SpecError
from diffa.evaluation.batched_model import BatchedModel
from diffa.evaluation.batches import BatchRow, make_batches, unfinished_batches
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.items import EvaluationError, Question
from diffa.evaluation.records import RunFolder
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


class TestKilledRuns:
    @pytest.mark.forks
    @pytest.mark.parametrize("kill", range(2))
    def test_a_resumed_run_writes_the_same_bytes(self, model, data, whole, tmp_path, kill):
        """Killed with SIGKILL at random, twice: the second time within a line."""
        draw = np.random.default_rng(kill)
        for half in (False, True):
            stop = int(draw.integers(1, 3))
            if not (child := os.fork()):
                die_after(model, data, tmp_path, stop, half)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert not (tmp_path / "records.jsonl").exists()
        evaluate(model, load_suite("mmsu"), BenchmarkData(data), tmp_path, EvalConfig(batch_size=4))
        assert records(tmp_path) == records(whole)
        assert (tmp_path / "scores.json").is_file()

    @pytest.mark.forks
    def test_a_thousand_rows_killed_at_random_give_the_same_bytes(self, model, data, tmp_path):
        file = data.parent / "thousand.jsonl"
        rows = ({**row(n % COUNT), "id": n} for n in range(1000))
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        stub = Stub(model)
        evaluate(
            stub,
            load_suite("mmsu"),
            BenchmarkData(file),
            tmp_path / "whole",
            EvalConfig(block_length=8),
        )
        draw = np.random.default_rng()
        for turn in range(4):
            if not (child := os.fork()):
                die_after(stub, file, tmp_path / "killed", int(draw.integers(1, 14)), turn % 2 == 0)
            os.waitpid(child, 0)
        asked = stub.asked
        evaluate(
            stub,
            load_suite("mmsu"),
            BenchmarkData(file),
            tmp_path / "killed",
            EvalConfig(block_length=8),
        )
        assert records(tmp_path / "killed") == records(tmp_path / "whole")
        assert 0 < stub.asked - asked < 1000

    def test_what_is_done_is_not_asked_again(self, model, data, whole, monkeypatch):
        before = records(whole)
        monkeypatch.setattr(diffa.Model, "answer", None)
        evaluate(model, load_suite("mmsu"), BenchmarkData(data), whole, EvalConfig(batch_size=4))
        assert records(whole) == before

    def test_another_run_is_refused_in_the_same_folder(self, model, data, whole):
        with pytest.raises(EvaluationError, match="max_tokens: None, now 2"):
            evaluate(
                model, load_suite("mmsu"), BenchmarkData(data), whole, EvalConfig(max_tokens=2)
            )


def die_after(model: diffa.Model, data: Path, out: Path, stop: int, half: bool) -> None:
    """Run until some batches are written (the last only in part), then die on the spot."""
    written = []
    append = RunFolder.append

    def count(self, answers, times):
        written.append(1)
        if len(written) == stop and half:
            line = json.dumps(answers[0]).encode()
            with (self.path / "parts" / "answers-000.jsonl").open("ab") as file:
                file.write(line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, answers, times)
        if len(written) == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.append = count
    try:
        settings = (
            EvalConfig(block_length=8) if isinstance(model, Stub) else EvalConfig(batch_size=4)
        )
        evaluate(model, load_suite("mmsu"), BenchmarkData(data), out, settings)
    finally:
        os._exit(9)


class TestBatches:
    def test_batch_1_and_16_give_the_same_records(self, model, data, whole, tmp_path):
        for size in (1, 16):
            out = tmp_path / str(size)
            evaluate(
                model, load_suite("mmsu"), BenchmarkData(data), out, EvalConfig(batch_size=size)
            )
            assert records(out) == records(whole)

    def test_cores_share_a_batch_and_write_the_same_records(
        self, model, data, whole, tmp_path, monkeypatch
    ):
        meet, answer, seen = threading.Barrier(2), diffa.Model.answer, []

        def together(self, audio, question, **options):
            seen.append((len(question), torch.get_num_threads()))
            if sum(rows for rows, _ in seen) <= 16:
                meet.wait(20)  # passed only when both halves are being answered
            return answer(self, audio, question, **options)

        monkeypatch.setattr(diffa.Model, "answer", together)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            evaluate(
                model, load_suite("mmsu"), BenchmarkData(data), tmp_path, EvalConfig(batch_size=16)
            )
            after, later = torch.get_num_threads(), []
            thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            thread.join()
        finally:
            torch.set_num_threads(before)
        assert records(tmp_path) == records(whole)
        assert seen == [(8, 1), (8, 1)]
        assert (after, later) == (2, [2])

    @pytest.mark.parametrize("cores", [1, 2, 3])
    def test_batches_are_answered_in_their_order_and_one_is_read_ahead(
        self, model, monkeypatch, cores
    ):
        heard, told = [], []
        stub = Stub(model)
        clips = [BatchRow(n, Question("", (), 4, None), 1.0) for n in range(45)]
        asking = BatchedModel(stub)
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        monkeypatch.setattr(stub, "answer", lambda waves, questions, **options: told_by(waves))

        def told_by(waves):
            time.sleep(0.001 * (len(waves) % 3))
            return diffa.Answer(
                [str(int(wave[0])) for wave in waves],
                [wave.long() for wave in waves],
                1,
                [0.0] * len(waves),
            )

        def hear(number):
            heard.append(number)
            return "nothing there" if number == 20 else torch.tensor([float(number)])

        batches_ = [clips[i : i + 12] for i in range(0, 45, 12)]
        for batch, waves, given in asking.answer_batches(batches_, hear, 12):
            told += [(c.number, a.text, a.error) for c, a in zip(batch, given, strict=True)]
            assert len(waves) == len(batch)
            assert len(heard) - len(told) <= (12 if cores > 1 else 0)
        expected = [(n, str(n), None) for n in range(45)]
        expected[20] = (20, None, "nothing there")
        assert told == expected and heard == list(range(45))

    def test_a_part_that_is_interrupted_stops_the_other(self, model, data, tmp_path, monkeypatch):
        answer, started, steps = diffa.Model.answer, threading.Event(), []

        def slow(self, audio, question, on_step, **options):
            def watch(step):
                started.set()
                steps.append(1)
                time.sleep(0.02)
                on_step(step)

            if threading.current_thread().name.endswith("_0"):
                started.wait(20)
                raise KeyboardInterrupt
            return answer(self, audio, question, on_step=watch, **options)

        monkeypatch.setattr(diffa.Model, "answer", slow)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            settings = EvalConfig(batch_size=16, max_tokens=64, block_length=64)
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, load_suite("mmsu"), BenchmarkData(data), tmp_path, settings)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)
        assert 0 < len(steps) < 20  # of 64

    def test_shards_give_the_same_records_as_one_process(self, model, data, whole, tmp_path):
        for rank in (1, 0):
            report = evaluate(
                model,
                load_suite("mmsu"),
                BenchmarkData(data),
                tmp_path,
                EvalConfig(batch_size=4, rank=rank, world_size=2),
            )
            assert (report is None) == (rank == 1)
        assert records(tmp_path) == records(whole)

    def test_a_batch_keeps_to_its_size_its_budget_and_one_setting(self):
        asked = [Question("", (), 4, 4), Question("", (), 8, 4)]
        clips = [BatchRow(n, asked[n % 2], float(n % 7)) for n in range(1, 60)]
        made = make_batches(clips, batch_size=5, batch_seconds=12.0)
        assert sorted(c.number for b in made for c in b) == list(range(1, 60))
        for batch in made:
            longest = max(clip.seconds for clip in batch)
            assert len(batch) <= 5 and (len(batch) == 1 or len(batch) * longest <= 12)
            assert len({clip.question for clip in batch}) == 1
        done = {clip.number: {} for clip in made[0]}
        assert unfinished_batches(made, done) == made[1:]

    def test_a_batch_that_fails_is_taken_apart(self, model, data, tmp_path, monkeypatch):
        answer = diffa.Model.answer

        def fail(self, audio, question, **options):
            if any("please please please" in text for text in question):
                raise SpecError("too long")
            return answer(self, audio, question, **options)

        monkeypatch.setattr(diffa.Model, "answer", fail)
        report = evaluate(
            model, load_suite("mmsu"), BenchmarkData(data), tmp_path, EvalConfig(batch_size=16)
        )
        assert [fault["row"] for fault in report["failed"]] == list(range(4, COUNT + 1, 4))
        assert report["fixed"]["total"] == COUNT


class TestModes:
    def test_likelihood_answers_with_a_letter(self, model, data, tmp_path):
        settings = EvalConfig(mode="likelihood", limit=3)
        report = evaluate(model, load_suite("mmsu"), BenchmarkData(data), tmp_path, settings)
        lines = [json.loads(line) for line in records(tmp_path).splitlines()]
        assert all(line["response"] in "ABCD" and line["num_forwards"] == 1 for line in lines)
        assert report["official"]["total"] == 3 and report["official"]["excluded"] == 0

    def test_the_papers_block_is_set_and_can_be_changed(self, model, data, tmp_path):
        digests = set()
        for block in (None, 2):
            out = tmp_path / str(block)
            evaluate(
                model,
                load_suite("mmsu"),
                BenchmarkData(data),
                out,
                EvalConfig(limit=1, block_length=block),
            )
            line = json.loads(records(out))
            digests.add(line["spec_digest"])
            assert line["max_tokens"] == line["num_forwards"] == 4
        four, two = (model.spec.set("sampler.block_length", n).digest() for n in (4, 2))
        assert digests == {four, two}

    @pytest.mark.parametrize(
        ("name", "subset", "file"),
        [
            ("voicebench", "sd-qa", "diffa-sd-qa-usa-audio.jsonl"),
            ("voicebench", "openbookqa", "diffa-openbookqa-test-audio.jsonl"),
            ("asr", "", "asr-predictions.txt"),
            ("spokenqa", "", "spokenqa-predictions.jsonl"),
            ("mmau", "", "mmau-predictions.json"),
            ("mmar", "", "mmar-predictions.jsonl"),
        ],
    )
    def test_every_suite_runs_and_writes_its_official_file(
        self, model, data, tmp_path, name, subset, file
    ):
        fields = {"prompt": "?", "reference": "A", "answer": "x", "choices": ["x", "y"]}
        source = data.parent / "any.jsonl"
        source.write_text(json.dumps({**row(0), **fields}) + "\n")
        settings = EvalConfig(max_tokens=2, block_length=2)
        report = evaluate(
            model, load_suite(name, subset), BenchmarkData(source), tmp_path, settings
        )
        assert report["items"] == 1 and not report["failed"] and not report["invalid"]
        assert (tmp_path / file).is_file()
        if subset == "sd-qa":
            assert report["official"]["accuracy"] is None  # until a judge has read it

    def test_a_run_passes_diffas_exact_text_to_the_model_and_its_choices_to_the_scores(
        self, model, data, tmp_path, monkeypatch
    ):
        answer, trims = diffa.Model.answer, []

        def note(self, audio, question, *, trim, **options):
            trims.append(trim)
            return answer(self, audio, question, trim=trim, **options)

        monkeypatch.setattr(diffa.Model, "answer", note)
        padded = {**row(0), "choice_a": None, "prompt": "?", "reference": "A"}
        source = data.parent / "padded.jsonl"
        source.write_text(json.dumps(padded) + "\n")
        for name, subset, prompt in (
            ("voicebench", "openbookqa", "voicebench@diffa"),
            ("mmsu", "", "mmsu@diffa"),
        ):
            suite, out = load_suite(name, subset), tmp_path / name
            config = EvalConfig(prompt=prompt, max_tokens=2, block_length=2)
            assert evaluate(model, suite, BenchmarkData(source), out, config)["items"] == 1
        assert trims == [False, True]
        exported = json.loads((tmp_path / "mmsu" / "mmsu-predictions.jsonl").read_text())
        assert exported["prompt_id"] == "mmsu@diffa"

    def test_an_unknown_prompt_says_which_there_are(self, model, data, tmp_path):
        with pytest.raises(SpecError, match="mmsu@2025-06"):
            evaluate(
                model,
                load_suite("mmsu"),
                BenchmarkData(data),
                tmp_path,
                EvalConfig(prompt="mmsu@2025"),
            )


def test_another_run_is_told_by_the_field_in_which_it_differs(tmp_path):
    RunFolder(tmp_path).write_header(
        {"spec": {"encoder": {"width": 8, "path": "x" * 400}}, "seed": 1}
    )
    with pytest.raises(EvaluationError) as caught:
        RunFolder(tmp_path).write_header(
            {"spec": {"encoder": {"width": 9, "path": "x" * 400}}, "seed": 1}
        )
    assert "(spec.encoder.width: 8, now 9)" in str(caught.value)
    with pytest.raises(EvaluationError, match=r"spec: \{'encoder.{40,60}\.\.\., now None"):
        RunFolder(tmp_path).write_header({"seed": 1})


@pytest.mark.slow
def test_accelerate_starts_processes_that_share_a_run(model, data, whole, tmp_path):
    import subprocess
    import sys

    spec, out = tmp_path / "model", tmp_path / "out"
    diffa.save(model, spec)  # its weights are random: each process would have its own

    words = ["--cpu", "--num_processes", "2", "-m", "diffa", "eval", "run", "mmsu"]
    words += ["--data", str(data), "--spec", str(spec), "--out", str(out), "--batch", "4"]
    order = [sys.executable, "-m", "accelerate.commands.launch", *words, "--device", "cpu"]
    subprocess.run(order, check=True, timeout=500)
    assert answers(out) == answers(whole)
