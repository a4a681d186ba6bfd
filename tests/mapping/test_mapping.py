"""Answers about a corpus: every row once, the same bytes however often it is interrupted."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.leftovers import leftover
from helpers.serving import recording
from typer.testing import CliRunner

import diffa
from diffa.cli import app
from diffa.data.samples import DataError
from diffa.errors import DiffaError, SpecError
from diffa.mapping import pool
from diffa.mapping.plan import MapPlan, ModelSource
from diffa.mapping.rows import QuestionManifest
from diffa.mapping.run import run_map
from diffa.mapping.shards import ShardReport

ROWS, BROKEN = 11, {3, 6, 9}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Eleven rows: a missing recording, a broken one, and one without a question among them."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for number in range(ROWS):
        name = f"{number}.wav"
        if number != 3:
            data = b"RIFF" if number == 6 else recording(0.1 + 0.05 * number, seed=number)
            (folder / name).write_bytes(data)
        row = {"audio_filepath": name, "audio_id": f"id{number}", "input": f"What is {number}?"}
        if number == 9:
            del row["input"]
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose random weights are the same for every process."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    diffa.save(diffa.build("tiny"), folder)
    return folder


def planned(manifest, saved, question=None, **options):
    spec = diffa.Spec.read("tiny").resolve()
    rows = QuestionManifest(manifest, question=question)
    fields = {
        "manifest": str(manifest),
        "folder": None,
        "digest": rows.digest,
        "question": question,
        "system": None,
        "max_tokens": 8,
        "num_rows": len(rows),
        "shard_size": 2,
        "batch_size": 2,
        "source": ModelSource(spec.data, str(saved), "cpu", None),
        "threads": 1,
    }
    return MapPlan(**{**fields, **options})


def table(out):
    """All rows of all shards, in order."""
    rows = [row for file in sorted(out.glob("part-*")) for row in pq.read_table(file).to_pylist()]
    return rows


def contents(out):
    return {file.name: file.read_bytes() for file in sorted(out.glob("part-*.parquet"))}


@pytest.fixture(scope="module")
def whole(manifest, saved, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_map(planned(manifest, saved), out)
    return out


def test_every_row_is_there_once_with_its_answer_or_its_fault(whole, manifest, saved):
    rows = table(whole)
    assert [row["row"] for row in rows] == list(range(ROWS))
    assert {row["row"] for row in rows if row["error"] is not None} == BROKEN
    assert "no question" in rows[9]["error"] and "3.wav" in rows[3]["error"]
    assert str(manifest.parent) not in rows[3]["error"]
    model = diffa.load(saved)
    for row in rows:
        if row["row"] in BROKEN:
            assert row["text"] is None
            continue
        clip = manifest.parent / row["audio"]
        alone = model.answer(clip, row["question"], max_tokens=8)
        assert row["tokens"] == alone.tokens.tolist()
        assert (row["text"], row["num_forwards"]) == (alone.text, alone.num_forwards)
        assert row["audio_id"] == f"id{row['row']}"


def test_a_summary_counts_rows_hours_and_forwards(whole):
    found = json.loads((whole / "summary.json").read_text())
    rows = table(whole)
    assert (found["rows"], found["errors"]) == (ROWS, len(BROKEN))
    assert found["num_forwards"] == sum(row["num_forwards"] or 0 for row in rows)
    seconds = sum(row["seconds"] or 0 for row in rows)
    assert found["audio_hours"] == pytest.approx(seconds / 3600, abs=1e-6)


def test_a_damaged_shard_is_named_and_written_again(whole, manifest, saved, tmp_path, caplog):
    out = tmp_path / "run"
    run_map(planned(manifest, saved), out)
    for index, data in ((1, b""), (3, b"PAR1 and then the disk was full")):
        next(out.glob(f"part-0000{index}-*")).write_bytes(data)
    assert run_map(planned(manifest, saved), out).shards == 2
    assert contents(out) == contents(whole)
    assert caplog.text.count("is damaged") == 2 and "part-00001-of-00006.parquet" in caplog.text


def test_two_runs_in_one_folder_are_refused(manifest, saved, tmp_path):
    out = tmp_path / "run"

    def second(progress):
        with pytest.raises(
            DiffaError, match=r"run is in use by diffa map \(process \d+.*another folder"
        ):
            run_map(planned(manifest, saved), out)
        refused.append(progress.shards)

    refused = []
    run_map(planned(manifest, saved), out, on_progress=second)
    assert refused == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_cut_off_goes_on_and_ends_alike(whole, manifest, saved, tmp_path):
    out = tmp_path / "run"

    def stop(progress):
        if progress.shards == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_map(planned(manifest, saved), out, on_progress=stop)
    assert 0 < len(contents(out)) < 6
    leftover(out / "part-00004-of-00006.parquet").write_bytes(b"half")
    done = run_map(planned(manifest, saved), out)
    assert done.shards == 4
    assert contents(out) == contents(whole)
    assert not list(out.glob(".part*"))
    assert run_map(planned(manifest, saved), out).shards == 0


def test_another_question_needs_another_folder(whole, manifest, saved, tmp_path):
    with pytest.raises(SpecError, match="differs in question"):
        run_map(planned(manifest, saved, "Why?"), whole)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(SpecError, match="holds no run"):
        run_map(planned(manifest, saved), tmp_path)


def test_the_command_goes_on_with_the_threads_it_began_with(manifest, saved, tmp_path):
    def ask(*more):
        words = ["map", manifest, "--out", tmp_path / "run", "--spec", saved, "--max-tokens", 8]
        return CliRunner().invoke(app, [str(word) for word in [*words, *more]])

    assert ask("--threads", 1).exit_code == 0
    (tmp_path / "run" / "part-00000-of-00001.parquet").unlink()
    assert ask("--workers", 1).exit_code == 0  # which alone would mean all cores
    refused = ask("--threads", 5)
    assert "differs in threads" in str(refused.exception)


def test_a_run_that_answers_nothing_exits_with_1(saved, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"audio_filepath": "none.wav", "input": "?"}\n')
    words = ["map", tmp_path / "rows.jsonl", "--out", tmp_path / "run", "--spec", saved]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 1 and "1 of 1 rows have no answer" in done.stderr
    assert len(table(tmp_path / "run")) == 1


def test_a_manifest_that_has_changed_is_refused(manifest, saved, tmp_path):
    plan = planned(manifest, saved)._replace(digest="0" * 64)
    with pytest.raises(SpecError, match="has changed"):
        run_map(plan, tmp_path / "run")


def test_only_manifests_are_read(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rows.parquet is no .json or .jsonl.*convert"):
        QuestionManifest(tmp_path / "rows.parquet", question=None)


def test_a_question_for_all_rows_replaces_their_own(manifest, saved, tmp_path):
    run_map(planned(manifest, saved, "Who speaks?", num_rows=2), tmp_path / "run")
    assert {row["question"] for row in table(tmp_path / "run")} == {"Who speaks?"}


class Dying:
    """A writer whose process is killed the first ``times`` that it is given shard 2."""

    times = 1

    def __init__(self, plan, out, model):
        self.out = out

    def write(self, shard):
        tries = self.out / f"{shard}.tries"
        count = len(tries.read_text()) if tries.exists() else 0
        tries.write_text("x" * (count + 1))
        if shard == 2 and count < self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return ShardReport(shard, 1, 0, 0.0)


@pytest.fixture
def forked(monkeypatch):
    """Processes that take over what a test has patched, and need no model."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(pool, "load_worker_model", lambda plan, number: None)
    monkeypatch.setattr(pool, "ShardWriter", Dying)


@pytest.mark.forks
def test_a_process_that_dies_is_replaced_and_its_shard_done_again(forked, tmp_path):
    done = list(pool.map_in_pool(None, tmp_path, range(5), 2))
    assert sorted(written.shard for written in done) == [0, 1, 2, 3, 4]
    tries = {file.stem: len(file.read_text()) for file in tmp_path.glob("*.tries")}
    assert tries == {"0": 1, "1": 1, "2": 2, "3": 1, "4": 1}


@pytest.mark.forks
def test_a_process_that_dies_between_two_shards_is_replaced(forked, tmp_path, monkeypatch):
    monkeypatch.setattr(Dying, "times", 0)
    done = []
    for written in pool.map_in_pool(None, tmp_path, range(6), 2):
        if not done:  # one of them waits for its next shard now
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        done.append(written.shard)
    assert sorted(done) == [0, 1, 2, 3, 4, 5]


@pytest.mark.forks
def test_a_shard_that_kills_every_process_ends_the_run(forked, tmp_path, monkeypatch):
    monkeypatch.setattr(Dying, "times", 9)
    with pytest.raises(SpecError, match="shard 2 has ended 3 processes"):
        list(pool.map_in_pool(None, tmp_path, range(5), 2))


@pytest.mark.forks
def test_a_full_disk_of_a_worker_ends_the_run_with_its_reason(forked, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "part-0")

    monkeypatch.setattr(Dying, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        list(pool.map_in_pool(None, tmp_path, range(5), 2))


def children(parent):
    """Processes whose parent is ``parent``."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid,args", "--ppid", str(parent)], capture_output=True
    )
    lines = listed.stdout.decode().splitlines()[1:]
    return [int(line.split()[0]) for line in lines if "spawn_main" in line]


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing(whole, manifest, saved, tmp_path):
    words = ["map", str(manifest), "--out", str(tmp_path / "run"), "--spec", str(saved)]
    words += ["--device", "cpu", "--max-tokens", "8", "--shard", "2", "--batch", "2"]
    words += ["--workers", "2", "--threads", "1"]
    code = f"from diffa.cli import main\nif __name__ == '__main__': main({words!r})"
    script = tmp_path / "run.py"
    script.write_text(code)
    made = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)
    until = time.monotonic() + 600
    while not contents(tmp_path / "run"):  # both are at work from here on
        assert time.monotonic() < until and made.poll() is None
        time.sleep(0.01)
    found = children(made.pid)
    os.kill(found[0], signal.SIGKILL)
    assert len(found) == 2 and len(contents(tmp_path / "run")) < 6, "it was over before"
    assert made.wait(600) == 0, made.stderr.read().decode()
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.slow
def test_a_ray_node_that_is_killed_changes_nothing(whole, manifest, saved, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    from diffa.mapping.cluster import ReplicaLimits

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    killed = []

    def kill(progress):
        if not killed:
            killed.append(progress.shards)
            cluster.remove_node(second, allow_graceful=False)

    try:
        ray.init(address=cluster.address, log_to_driver=False)
        plan, out = planned(manifest, saved), tmp_path / "run"
        run_map(plan, out, address=cluster.address, replicas=ReplicaLimits(2, 2), on_progress=kill)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed and killed[0] < 6
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("name", ["http:x", "~nobody-of-this-name", "[red]"])
def test_folders_with_names_like_addresses_are_folders(
    manifest, saved, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    run_map(planned(manifest, saved), Path(name))
    assert len(list((tmp_path / name).glob("*.parquet"))) == 6
