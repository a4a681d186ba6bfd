"""``diffa ablate``: what is varied, what is trained once, what is resumed, and what is written."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from helpers import toy

from diffa.ablation import statistics
from diffa.ablation.grid import make_grid
from diffa.ablation.overrides import override
from diffa.ablation.plot import plot_summary
from diffa.ablation.related_parts import to_llama_config
from diffa.ablation.study import Study, ablate
from diffa.ablation.table import (
    SummaryRow,
    metric_names,
    runs_csv,
    study_markdown,
    summary_csv,
    summary_rows,
)
from diffa.ablation.vary import parse_axes, parse_axis
from diffa.ablation.worker import flatten_numbers
from diffa.cli import main
from diffa.errors import SpecError
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config import Recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, eight tones, and a recipe of two short stages for two adapters."""
    place = tmp_path_factory.mktemp("world")
    toy.write_tokenizer(place / "tokenizer")
    toy.write_tones(place)
    (place / "recipe.yaml").write_text(json.dumps(plan(place)))
    return place


def plan(world: Path) -> dict[str, Any]:
    spec = toy.spec(world / "tokenizer")
    spec["encoder"] = {"name": "tiny", "window_seconds": 1.0, "width": 16, "layers": 2, "heads": 2}
    spec["adapters"] = {"acoustic": {"name": "qformer", "num_queries": 4}, **spec["adapters"]}
    spec["sampler_presets"] = {"quick": {"name": "blockwise", "threshold": 0.5}}
    held = {"data": [{"path": "train.json"}], "max_samples": 4, "max_tokens": 4}
    common = {
        "data": [{"path": "train.json"}],
        "train": ["adapters"],
        "batch_size": 2,
        "logging_steps": 1,
    }
    align = {**common, "name": "align", "adapters": ["semantic"], "max_steps": 1}
    tune = {
        **common,
        "name": "tune",
        "max_steps": 2,
        "cache": {},
        "evaluate": held,
        "objective": "masked",
    }
    return {"spec": spec, "stages": [align, tune]}


def recipe(world: Path) -> Recipe:
    return Recipe(plan(world), world)


# --- axes ---------------------------------------------------------------------------------------


def test_values_are_split_at_commas_outside_of_brackets():
    axis = parse_axis("encoder=tiny,{name: mel, bins: 40},{name: mel, bins: [1, 2]}")
    assert [value.label for value in axis.values] == [
        "tiny", "{name: mel, bins: 40}", "{name: mel, bins: [1, 2]}",
    ]  # fmt: skip
    assert axis.values[2].value == {"name": "mel", "bins": [1, 2]}
    assert parse_axis("backbone=llada,{name: llama, seed: 3}").values[1].label == "llama"
    assert [value.value for value in parse_axis("sampler.block_length=8,16").values] == [8, 16]


def test_a_value_may_stand_in_a_file(tmp_path):
    (tmp_path / "small.yaml").write_text("name: llama\nseed: 3\n")
    axis = parse_axis(f"backbone=llada,@{tmp_path}/small.yaml")
    assert axis.values[1] == ("small", {"name": "llama", "seed": 3})


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["backbone"], "PATH=VALUE"),
        (["backbone="], "PATH=VALUE"),
        (["a.b=1,1"], "given twice"),
        (["a=1,2", "a=3"], "given twice"),
        ([], "nothing to compare"),
    ],
)
def test_axes_that_say_nothing_are_refused(texts, told):
    with pytest.raises(SpecError, match=told):
        parse_axes(texts)


# --- changes ------------------------------------------------------------------------------------


def test_adapters_are_left_out_of_spec_and_stages(world):
    only = override(recipe(world), "adapters", "acoustic")
    assert list(only.spec.data["adapters"]) == ["acoustic"]
    assert [stage.name for stage in only.stages] == ["tune"]  # nothing was left to align
    both = override(recipe(world), "adapters", "both")
    assert list(both.spec.data["adapters"]) == ["acoustic", "semantic"]
    assert [stage.name for stage in both.stages] == ["align", "tune"]
    assert override(recipe(world), "adapters", "acoustic+semantic").data == both.data
    with pytest.raises(SpecError, match="did you mean 'semantic'"):
        override(recipe(world), "adapters", "semantics")


def test_a_llama_takes_the_size_of_the_llada_it_replaces(world):
    import diffa

    old, new = recipe(world).spec, override(recipe(world), "backbone", "llama")
    wide, swapped = (diffa.build(spec, device="meta") for spec in (old, new.spec))
    assert wide.backbone.transformer.config == swapped.backbone.transformer.config
    data = new.spec.resolve().data
    assert (data["objective"]["name"], data["sampler"]["name"]) == ("autoregressive", "greedy")
    assert data["sampler_presets"] == {} and new.stages[1].objective is None
    assert to_llama_config({"d_model": 4, "mlp_ratio": 3})["intermediate_size"] == 12


def test_weights_are_never_guessed(world):
    data = plan(world)
    data["spec"]["backbone"] = {"name": "llada", "checkpoint": "GSAI-ML/LLaDA-8B-Instruct"}
    with pytest.raises(SpecError, match="nothing says which llama has"):
        override(Recipe(data, world), "backbone", "llama")


def test_any_path_of_spec_or_recipe_can_be_varied(world):
    base = recipe(world)
    assert override(base, "sampler.block_length", 4).spec.data["sampler"]["block_length"] == 4
    assert (
        override(base, "spec.sampler", "quick").spec.resolve().data["sampler"]["threshold"] == 0.5
    )
    assert override(base, "stages.tune.max_steps", 7).stages[1].max_steps == 7
    rates = override(base, "stages.*.optimizer.lr", 1e-3).stages
    assert [stage.optimizer.lr for stage in rates] == [1e-3, 1e-3]
    assert override(base, "adapters.semantic.stride", 2).spec.data["adapters"]["semantic"]["stride"]
    with pytest.raises(SpecError, match="seeds are not compared"):
        override(base, "seed", 3)
    with pytest.raises(SpecError, match=r"at backbone=llada, sampler\.block_lenth=3"):
        make_grid(base, parse_axes(["backbone=llada", "sampler.block_lenth=3"]), 1)


# --- the grid -----------------------------------------------------------------------------------


def trainings(base: Recipe, *vary: str, seeds: int = 1) -> int:
    return len({cell.training for cell in make_grid(base, parse_axes(vary), seeds)})


def test_cells_that_differ_in_decoding_alone_share_a_training(world):
    base = recipe(world)
    assert trainings(base, "sampler.block_length=4,8,16", "prompt.max_tokens=4,8") == 1
    assert trainings(base, "stages.tune.evaluate.max_tokens=4,8") == 1
    assert trainings(base, "sampler.block_length=4,8", seeds=3) == 3
    assert trainings(base, "adapters=semantic,both") == 2
    assert trainings(base, "stages.tune.max_steps=1,2") == 2


def test_a_sampler_that_chooses_weights_belongs_to_the_training(world):
    data = plan(world)
    data["stages"][1] |= {"load_best_model_at_end": True}
    assert trainings(Recipe(data, world), "sampler.block_length=4,8") == 1  # chosen by the loss
    data["stages"][1]["evaluate"]["best_metric"] = "exact"
    assert trainings(Recipe(data, world), "sampler.block_length=4,8") == 2


# --- numbers ------------------------------------------------------------------------------------


def test_intervals_are_students():
    # t of 2 and 9 degrees of freedom, from the printed tables
    ten = [float(value) for value in range(10)]
    half = statistics.mean_interval(ten).half
    assert half == pytest.approx(2.262 * stdev(ten) / 10**0.5, rel=2e-4)
    found = statistics.mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert statistics.mean_interval([4.0]) == (4.0, None, 1)
    assert found.text() == "2.0 ± 2.5"


def test_differences_are_paired_by_seed():
    found = statistics.paired_interval({0: 5.0, 1: 7.0, 2: 1.0}, {0: 4.0, 1: 6.0, 9: 0.0})
    assert found == (1.0, 0.0, 2)
    assert statistics.paired_interval({0: 1.0}, {1: 1.0}) is None


def test_every_number_of_a_score_is_found():
    made = {"scores": {"a": {"value": 0.5, "low": 0.1}, "b": 2}, "name": "x", "good": True}
    assert dict(flatten_numbers(made)) == {"scores.a": 0.5, "scores.b": 2.0}


def test_tables_say_what_was_measured(world):
    axes = parse_axes(["adapters=semantic,both", "sampler.block_length=4,8"])
    grid = make_grid(recipe(world), axes, 3)
    results = {
        cell.name: {
            "metrics": {
                "loss": 2.0,
                "exact": 0.1 * cell.seed + (cell.labels["adapters"] == "both"),
            },
            "parameters": {"total": 1000, "trained": 10},
            "stages": ["tune"],
            "seconds": 1.0,
        }
        for cell in grid[:-1]
    }
    study = Study(axes, grid, results, {}, world)
    assert metric_names(study) == ["exact", "loss"] and metric_names(study, "loss")[0] == "loss"
    found = summary_rows(study)
    assert [row.label for row in found] == ["semantic, 4", "semantic, 8", "both, 4", "both, 8"]
    assert found[2].difference.mean == pytest.approx(1.0) and found[2].difference.half < 1e-9
    assert found[3].missing == 1 and found[3].means["exact"].n == 2
    text = study_markdown(study)
    assert "| both | 4 | 3 | 1,000 | 10 | 1.10 ± 0.25 | 2.000 ± 0.000 |" in text
    assert "1 of 12 runs have no result yet" in text
    lines = list(csv.DictReader(summary_csv(study).splitlines()))
    assert float(lines[0]["exact high"]) == pytest.approx(0.1 + 4.303 * 0.1 / 3**0.5, abs=1e-3)
    told = list(csv.DictReader(runs_csv(study).splitlines()))
    assert len(told) == 11 and "training seconds" in told[0]  # a score may have "seconds" as well
    with pytest.raises(SpecError, match="did you mean 'exact'"):
        metric_names(study, "exakt")


# --- the whole ----------------------------------------------------------------------------------

SCORE = """
import json, sys
spec = json.load(open(sys.argv[1] + "/spec.json"))
block_length = {"value": spec["sampler"]["block_length"], "n": 1}
json.dump({"block_length": block_length}, open(sys.argv[2], "w"))
"""


def call(words: list[str]) -> int:
    """Exit code of a command in this process."""
    try:
        main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_study_runs_resumes_and_is_written(world, tmp_path, capsys):
    """Two adapters' sets under one seed, two ways to decode each: two trainings, four cells."""
    out = tmp_path / "study"
    (tmp_path / "score.py").write_text(SCORE)
    words = ["ablate", str(world / "recipe.yaml"), "--vary", "adapters=semantic,both"]
    words += [
        "--vary",
        "sampler.block_length=2,4",
        "--seeds",
        "1",
        "--out",
        str(out),
        "--jobs",
        "0",
    ]
    words += ["--score", f"{sys.executable} {tmp_path / 'score.py'} {{model}} {{json}}"]
    assert call([*words, "--dry-run"]) == 0
    assert "4 runs, 2 trainings" in capsys.readouterr().err and not out.exists()
    assert call(words) == 0
    told = capsys.readouterr()
    assert "2 trainings to run" in told.err
    lines = list(csv.DictReader((out / "table.csv").open()))
    assert [line["adapters"] for line in lines] == ["semantic", "semantic", "both", "both"]
    assert [float(line["block_length mean"]) for line in lines] == [2, 4, 2, 4]
    assert int(lines[2]["trained"]) > int(lines[0]["trained"]) > 0
    assert all(0 <= float(line["exact mean"]) <= 1 for line in lines)
    assert lines[0]["loss mean"] == lines[1]["loss mean"] != lines[2]["loss mean"]
    ElementTree.parse(out / "plot.svg")
    # what the encoder hears is kept for all trainings: 8 tones, two sets of layers that are read
    assert 8 <= len(list((out / "features").glob("*/*"))) <= 16
    assert not list(out.glob("runs/*/features"))
    assert (out / "table.md").read_text().strip() == told.out.strip()
    # again: nothing is left to do; a lost result is measured again, nothing is trained again
    lost = sorted((out / "results").glob("*.json"))[0]
    before = json.loads(lost.read_text())
    lost.unlink()
    weights = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/2-tune/weights*")}
    assert call(words) == 0
    assert "1 trainings to run" in capsys.readouterr().err
    assert json.loads(lost.read_text())["metrics"] == before["metrics"]
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    # without the command that scored them, cells are measured anew
    assert call([word for word in words if "score" not in word]) == 0
    assert "2 trainings to run" in capsys.readouterr().err
    assert "block_length" not in (out / "table.csv").read_text().splitlines()[0].replace(
        ".block_length", ""
    )


@pytest.mark.parametrize("jobs", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_is_named_and_the_others_go_on(world, tmp_path, jobs):
    """The second one's data is not there; once in this process, once in two others at a time."""
    study = ablate(
        recipe(world), ["stages.align.data=[{path: gone.json}],[{path: train.json}]"],
        out=tmp_path / "study", seeds=1, jobs=jobs, overrides=["stages.tune.max_steps=1"],
    )  # fmt: skip
    assert len(study.results) == 1, study.faults
    (fault,) = study.faults.values()
    assert "gone.json" in fault and (".log" in fault or not jobs)


def test_a_study_does_not_go_on_with_other_data(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    options = {"out": tmp_path / "study", "seeds": 1, "jobs": 0}
    vary = ["stages.tune.max_steps=1,2"]
    ablate(recipe(tmp_path / "world"), vary, **options)
    rows = tmp_path / "world" / "train.json"
    rows.write_text(json.dumps(json.loads(rows.read_text())[:-1]))
    with pytest.raises(TrainingError, match=r"train\.json changed since the run"):
        ablate(recipe(tmp_path / "world"), vary, **options)


def test_parts_that_do_not_fit_are_found_before_anything_runs(world, tmp_path):
    with pytest.raises(SpecError, match=r"adapters.acoustic.encoder_layers=\[9\] cannot be built"):
        ablate(recipe(world), ["adapters.acoustic.encoder_layers=[0],[9]"], out=tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_faults_are_usage_errors(capsys):
    assert call(["ablate", "nothing", "--vary", "a=1"]) == 2
    assert "there is no recipe 'nothing'" in capsys.readouterr().err


def test_the_plot_shows_every_row_with_the_metric_and_repeats_byte_for_byte():
    mean = statistics.mean_interval([0.4, 0.6])
    row = SummaryRow(
        labels={"adapters": "both"}, spec_digest="", parameters=1, trained=1,
        by_seed={"exact": {0: 0.4, 1: 0.6}}, means={"exact": mean}, difference=None, stages=[],
        missing=0,
    )  # fmt: skip
    other = row._replace(labels={"adapters": "semantic"}, means={}, by_seed={})
    text = plot_summary([row, other], "exact", "adapters")
    assert "both" in text and "semantic" not in text and ">exact<" in text
    assert plot_summary([row, other], "exact", "adapters") == text
    assert "nothing measured yet" in plot_summary([other], "exact", "adapters")


def test_options_that_name_a_left_out_adapter_lose_it(world):
    data = plan(world)
    data["stages"][1]["adapters"] = ["acoustic", "semantic"]
    data["stages"][1]["train"] = ["adapters.acoustic", "adapters.semantic"]
    stage = override(Recipe(data, world), "adapters", "acoustic").data["stages"][0]
    assert stage["adapters"] == ["acoustic"] and stage["train"] == ["adapters.acoustic"]
