"""Benchmarks: the parts of them that could report or write something wrong."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffa.ablation.study import ablate

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    # Folders of tests have the same names: tests.evaluation may have been imported before.
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_wilson_intervals_contain_their_value_and_error_rates_above_one_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wilson = benchmark("nano", monkeypatch).wilson
    for hits in (0, 3, 10):
        interval = wilson(hits, 10)
        assert interval["low"] <= interval["value"] == hits / 10 <= interval["high"] + 1e-12
    assert wilson(15, 10) == {"value": 1.5, "low": None, "high": None, "n": 10}


def test_a_backbone_from_the_package_can_be_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"name": "llada", "checkpoint": "package:nano/llada"}
    state = {"ln_f.weight": torch.ones(4)}
    benchmark("pack_nano", monkeypatch).backbone(options, state, tmp_path)
    written = json.loads((tmp_path / "llada" / "config.json").read_text())
    assert written["model_type"] == "llada" and written["d_model"] > 0


def test_nano_ablations_tabulate_the_scores_of_each_cell_over_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablations = benchmark("nano_ablations", monkeypatch)
    grids = ablations.grids("package:nano/llada")
    studies = [
        ablate("nano-adapters", vary, out=tmp_path, seeds=2, dry_run=True)
        for vary in grids.values()
    ]
    assert [len(study.runs) for study in studies] == [8, 6]
    both = {run.spec_digest for run in studies[0].runs} & {
        run.spec_digest for run in studies[1].runs
    }
    assert len(both) == 1  # whisper before the semantic adapter is measured once for both tables
    first = [run for run in studies[0].runs if run.spec_digest == studies[0].runs[0].spec_digest]
    for run, value in zip(first, (0.5, 0.7), strict=True):
        metrics = dict.fromkeys(ablations.SCORES.values(), value)
        note = {"metrics": metrics, "parameters": {"total": 9, "trained": 5}, "stages": ["align"]}
        studies[0].results[run.name] = note | {"seconds": 1.0}
    (row,) = ablations.table(studies[0])  # the others are not measured
    assert row["settings"] == {"backbone": "llada", "adapters": "both"}
    assert row["accent"]["mean"] == pytest.approx(0.6) and row["accent"]["half"] > 1
    assert list(row["accent"]["seeds"].values()) == [0.5, 0.7]
    assert "| llada | both | 2 | 5 | 0.600 ± 1.271 |" in ablations.markdown([row])


def test_process_memory_is_at_most_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = benchmark("reports", monkeypatch)
    assert 2**20 < reports.process_memory("VmRSS") <= reports.process_memory("VmHWM")


def test_a_report_is_written_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report = benchmark("reports", monkeypatch).write_report
    write_report({"rows": [1]}, None)
    write_report({"rows": [1]}, tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == {"rows": [1]}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports_and_explains_its_options(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark(path.stem, monkeypatch)
    if "argparse" not in path.read_text():
        return
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


@pytest.mark.forks
def test_kills_find_what_is_lost_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile_disk = benchmark("hostile_disk", monkeypatch)

    def careless(out: Path) -> None:
        out.mkdir(exist_ok=True)
        draft = out / f".draft-{time.monotonic_ns()}"
        draft.write_text("half")
        with (out / "a.wav").open("wb", buffering=0) as file:
            file.write(b"half")
            time.sleep(0.5)
            file.write(b"whole")
        draft.unlink()

    (tmp_path / "place").mkdir()
    trials = hostile_disk.Trials(careless, tmp_path / "place", tmp_path / "log")
    trials.kill(0.2, full=False)
    assert trials.counts == {
        "trials": 1, "disturbed": 1, "losses": 1, "leftovers": 1, "unworded": 0
    }  # fmt: skip
    assert "a.wav is incomplete" in trials.faults[0] and ".draft-" in trials.faults[1]
