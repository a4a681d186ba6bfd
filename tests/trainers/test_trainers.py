"""Recipes, the training loop, resuming, checkpoints and what runs report."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.toy import QUIET
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import diffa
from diffa.adapters.conv import Conv
from diffa.adapters.qformer import QFormer
from diffa.data.collate import Collate
from diffa.data.samples import DataError, Sample
from diffa.errors import DiffaError, SpecError
from diffa.nano.auxiliary import CTCLoss, TranscriptEmbedder, scale_to_embeddings
from diffa.runtime.files import locked
from diffa.trainers import Recipe, Report, train
from diffa.trainers import checkpoints as folder
from diffa.trainers.checkpoints import TrainingError, checkpoints, replacing
from diffa.trainers.config import recipes
from diffa.trainers.config_sections import OptimizerConfig, ScheduleConfig, StageConfig
from diffa.trainers.evaluate import BestWeights, compare, is_better
from diffa.trainers.inputs import claim_inputs
from diffa.trainers.muon import Muon, orthogonalize
from diffa.trainers.optim import build_optimizer, build_schedule
from diffa.trainers.progress import read_log
from diffa.trainers.run import build_model
from diffa.trainers.run_context import RunContext
from diffa.trainers.stage import build_trainer
from diffa.trainers.trainable import stage_model
from diffa.types import Embeds, Features, FeatureSpec


def recipe(world: Path, **changes: Any) -> dict[str, Any]:
    """One short stage that aligns a conv adapter, with dropout in it so that chance matters."""
    spec = toy.spec(world / "tokenizer")
    spec["encoder"] = {"name": "tiny", "window_seconds": 1.0, "width": 16, "layers": 2, "heads": 2}
    spec["adapters"] = {"acoustic": {"name": "qformer", "num_queries": 4}, **spec["adapters"]}
    stage = {
        "name": "align",
        "data": [{"path": str(world / "train.json")}],
        "train": ["adapters"],
        "max_steps": 6,
        "batch_size": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
    }
    return {"spec": spec, "save_total_limit": 9, "stages": [stage | changes]}


def nano(**options: Any) -> dict[str, Any]:
    """The learner nano-answers, with the toy tokenizer's "?" as its blank."""
    return {"name": "nano-answers", "blank_token": "?", **options}


def go(made: dict[str, Any], out: Path, **options: Any) -> Report:
    return train(made, out=out, **{"console": QUIET, "device": "cpu", **options})


def weights(out: Path, stage: str = "1-align") -> dict[str, torch.Tensor]:
    return load_file(out / stage / "weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- recipes ------------------------------------------------------------------------------------


def test_all_faults_of_a_recipe_are_told_at_once(world: Path) -> None:
    bad = recipe(world, max_steps=None, batch_size=0, train=["adapter"], optimizer={"lrr": 1})
    bad["stages"][0]["load_best_model_at_end"] = True
    bad["stages"][0]["data"] = [{"path": "a.json", "source": "nano"}, {"path": 3}]
    bad["stages"][0]["evaluate"] = None
    bad["stages"].append({**bad["stages"][0], "name": "align", "objective": "maskd"})
    bad["save_total_limits"] = 1
    with pytest.raises(SpecError) as caught:
        Recipe(bad)
    text = str(caught.value)
    for fault in (
        "save_total_limits: unknown option, did you mean 'save_total_limit'",
        "stages.0: give either epochs or max_steps",
        "stages.0.batch_size: must be at least 1, got 0",
        "stages.0.train: unknown part 'adapter', did you mean 'adapters'",
        "stages.0.optimizer.lrr: unknown option",
        "stages.0.load_best_model_at_end: is true, but nothing is evaluated",
        "stages.0.data.0: give either path",
        "stages.0.data.1.path: expected str or null, got 3",
        "stages.1.name: 'align' is taken",
        "stages.1.objective",
    ):
        assert fault in text, fault


def test_a_stage_cannot_train_what_it_does_not_use(world: Path) -> None:
    with pytest.raises(SpecError, match=r"adapters.semantic is trained, but the stage does not"):
        Recipe(recipe(world, adapters=["acoustic"], train=["adapters.semantic"]))
    with pytest.raises(SpecError, match="cache: needs a frozen encoder"):
        Recipe(recipe(world, train=["encoder"], cache={}))
    with pytest.raises(SpecError, match=r"augment.spede: unknown option, did you mean 'speed'"):
        Recipe(recipe(world, augment={"spede": [1.0]}))
    with pytest.raises(SpecError, match="the stage has no adapter 'semantik', did you mean"):
        Recipe(recipe(world, learner=nano(ctc={"semantik": 0.3})))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"match_scale": ["semantic"]}, "match_scale: rescales 'semantic', which the stage does"),
        ({"init_copying": True}, "init_copying: initialises the backbone, which the stage does"),
        ({"question_packing": 6}, "question_packing: must be from 0 to 1, got 6"),
        (
            {"ctc_readout": "head", "embedding_match": 1.0},
            "embedding_match: is for ctc_readout: embeddings",
        ),
        (
            {"ctc_readout": "head", "ctc_logit_scale": 9.0},
            "ctc_logit_scale: is for ctc_readout: embeddings",
        ),
        ({"ctc": {"semantic": -1}}, "ctc: must be at least 0"),
        ({"blank_token": None, "ctc": {"acoustic": 1}}, "ctc: needs blank_token"),
        ({"blank_token": None, "text_mixup": 0.5}, "text_mixup: needs blank_token"),
        ({"blank_token": None, "ordinals": ["one"]}, "ordinals: needs blank_token"),
        ({"alignment": {"layer": 1}}, "alignment: give layer and weight"),
        ({"aligment": {}}, "aligment: unknown option, did you mean 'alignment'"),
    ],
)
def test_learner_options_that_would_do_harm_or_nothing_are_faults(
    world: Path, options: dict[str, Any], fault: str
) -> None:
    with pytest.raises(SpecError, match=f"stages.0.learner.{fault}"):
        Recipe(recipe(world, train=["adapters.acoustic"], learner=nano(**options)))


def test_recipes_are_changed_by_paths(world: Path) -> None:
    changed = Recipe(recipe(world)).change(
        [
            "stages.align.max_steps=9",
            "stages.0.optimizer.lr=5e-4",
            "seed=3",
            "spec.adapters.semantic.stride=2",
            "stages.0.data.0.weight=2.0",
        ]
    )
    assert changed.stages[0].max_steps == 9
    assert changed.stages[0].optimizer.lr == 5e-4
    assert changed.config.seed == 3
    assert changed.spec.data["adapters"]["semantic"]["stride"] == 2
    for wrong in ("stages.alig.max_steps=9", "stages.0.stepz=1", "seed", "spec.encode.width=1"):
        with pytest.raises(SpecError):
            Recipe(recipe(world)).change([wrong])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seed=-1", "seed: must be from 0 to 4294967295, got -1"),
        ("num_workers=-1", "num_workers: must be at least 0, got -1"),
        ("stages.0.optimizer.lr=-1", "stages.0.optimizer.lr: must be at least 0, got -1.0"),
        ("stages.0.optimizer.betas=[0.9, 1.0]", "betas: must be at least 0 and below 1"),
        ("stages.0.optimizer.betas=[0.9]", "betas: are two numbers, got 1"),
        (
            "stages.0.schedule.warmup_steps=-5",
            "schedule.warmup_steps: must be at least 0, got -5.0",
        ),
        ("stages.0.schedule.min_lr_ratio=2", "schedule.min_lr_ratio: must be from 0 to 1, got 2.0"),
        (
            "stages.0.evaluate={evaluators: [x], eval_steps: 0}",
            "evaluate.eval_steps: must be at least 1, got 0",
        ),
        ("stages.0.evaluate={eval_steps: 5}", "evaluate.data: missing"),
        ("stages.0.answer_length=[8, 0]", r"answer_length: must be at least 1, got \[8, 0\]"),
        ("stages.0.data.0.weight=0", "data.0.weight: must be above 0, got 0.0"),
        ("stages.0.learner={name: answer}", "learner: there is no learner 'answer', did you"),
        ("stages.0.learner=[]", "learner: expected a name or a mapping with a name"),
        ("stages.0.optimizer=null", "optimizer: expected a mapping, got None"),
        ("stages.0.data=x", "data: expected a list, got x"),
        ("stages.0=3", "stages.0: expected a mapping, got 3"),
        ("stages.0.data.5.path=x", "there is no 5; the list holds 0 to 0"),
        ("stages.0.data.last.path=x", "there is no last; the list holds 0 to 0"),
        ("stages.7.max_steps=1", "there is no stage '7'"),
    ],
)
def test_a_change_out_of_range_is_told(world: Path, change: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Recipe(recipe(world)).change([change])


def test_shipped_recipes_are_sound() -> None:
    assert {"diffa-1", "diffa-2"} <= set(recipes())
    for name in recipes():
        assert Recipe.read(name).stages
    with pytest.raises(SpecError, match="did you mean 'diffa-1'"):
        Recipe.read("diffa1")


def test_a_dry_run_plans_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    report = go(recipe(world, max_steps=None, epochs=3), tmp_path / "run", dry_run=True)
    (stage,) = report.stages
    assert (stage.steps, stage.rows) == (12, 8)
    assert stage.trained > 1000
    assert report.model is None
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_with_the_devices_of_each_stage(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(world, max_steps=None, epochs=2, devices=2)
    second = {**made["stages"][0], "name": "second", "devices": None}
    plan = made | {"devices": 1, "stages": [*made["stages"], second]}
    stages = go(plan, tmp_path, dry_run=True).stages
    assert [stage.steps for stage in stages] == [4, 8]  # 8 rows, 2 per device
    monkeypatch.setenv("WORLD_SIZE", "4")
    stages = go(plan, tmp_path, dry_run=True).stages
    assert [stage.steps for stage in stages] == [2, 2]  # torchrun decides


def test_a_run_on_other_devices_than_the_recipe_is_for_says_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(stderr=True, width=200)
    go(recipe(world, max_steps=1, devices=16), tmp_path, console=console)
    assert "align: batch_size is meant for 16 devices, this run has 1" in capsys.readouterr().err


# --- learning -----------------------------------------------------------------------------------


def test_a_model_learns_to_tell_high_from_low(world: Path, tmp_path: Path) -> None:
    held = [{"path": str(world / "train.json")}]
    made = recipe(
        world,
        train=["encoder", "adapters", "backbone"],
        adapters=["semantic"],
        max_steps=300,
        batch_size=8,
        save_steps=400,
        answer_length=4,
        max_grad_norm=10.0,
        optimizer={"lr": 2e-3, "weight_decay": 0.0},
        schedule={"warmup_steps": 5, "stable_ratio": 0.8},
        objective={"name": "masked", "full_mask_prob": 1.0},
        evaluate={"data": held, "eval_steps": 90, "max_samples": 8, "max_tokens": 4},
        load_best_model_at_end=True,
    )
    report = go(made, tmp_path)
    losses = [row["loss"] for row in read_log(tmp_path / "1-align" / "log.jsonl") if "loss" in row]
    # guessing between the two words costs log 2 in 7 tokens, 0.099, and errs in one of 14
    assert losses[-1] < 0.05 < 2.0 < losses[0]
    assert report.stages[0].metrics["accuracy"] == 1.0
    assert report.stages[0].metrics["eval_exact"] == 1.0
    # the saved model answers the same
    loaded = diffa.load(tmp_path / "model")
    files = [world / "tone0.wav", world / "tone1.wav"]
    answer = loaded.answer(files, ["What do you hear ?"] * 2, max_tokens=4)
    assert answer.text == ["high", "low"]


def test_what_is_frozen_stays_bit_for_bit(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = go(recipe(world, train=["adapters.semantic"]), tmp_path)
    assert report.model is not None
    fresh = diffa.build(report.model.spec)
    before, after = fresh.state_dict(), report.model.state_dict()
    parts = ("encoder.", "backbone.")
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith(parts))
    assert {key.split(".")[1] for key in weights(tmp_path)} == {"semantic"}


def test_frozen_parts_do_not_drop_out(world: Path, tmp_path: Path) -> None:
    from diffa.trainers.learners.answers import AnswerLearner
    from diffa.trainers.trainable import set_trainable

    model = diffa.build(recipe(world)["spec"])
    set_trainable(model, ["adapters.semantic"])
    AnswerLearner(model, StageConfig()).train()
    assert model.adapters["semantic"].training
    assert not model.adapters["acoustic"].training
    assert not model.encoder.training and not model.backbone.training


@pytest.mark.parametrize("normalization", ["batch", "sample", "masked"])
def test_accumulated_batches_equal_one_big_batch(
    world: Path, tmp_path: Path, normalization: str
) -> None:
    objective = {"name": "masked", "normalization": normalization}
    shared = {
        "max_steps": 2,
        "objective": objective,
        "train": ["adapters.semantic"],
        "group_by_length": False,
    }
    for name, batch, accumulate in (("big", 8, 1), ("small", 2, 4)):
        made = recipe(world, batch_size=batch, gradient_accumulation_steps=accumulate, **shared)
        go(made, tmp_path / name)
    big, small = weights(tmp_path / "big"), weights(tmp_path / "small")
    # Adam divides by the root of tiny squares: rounding shows most where gradients are nothing
    assert all(torch.allclose(big[key], small[key], atol=2e-5) for key in big)
    logs = [read_log(tmp_path / n / "1-align" / "log.jsonl")[0]["loss"] for n in ("big", "small")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_gradients_are_those_of_the_mean_loss(world: Path, tmp_path: Path) -> None:
    made = Recipe(
        recipe(
            world,
            batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=1,
            logging_steps=1,
            train=["adapters.semantic"],
        )
    )
    context = RunContext(recipe=made, out=tmp_path, device=torch.device("cpu"), console=QUIET)
    seen = stage_model(build_model(context, context.device), made.stages[0])
    running = build_trainer(seen, made.stages[0], 0, context)
    rows = [running.train_dataset[i] for i in range(8)]
    total, weight, *_ = running.model.train()(Collate(seen.backbone.vocab)(rows))
    learning = [p for p in running.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total / weight, learning)
    expected = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    running.train()
    (logged,) = [row for row in running.state.log_history if "grad_norm" in row]
    assert logged["grad_norm"] == pytest.approx(expected.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx((total / weight).item(), rel=1e-5)


def test_stages_hand_on_their_weights(world: Path, tmp_path: Path) -> None:
    made = recipe(world, max_steps=2, adapters=["semantic"])
    second = {**made["stages"][0], "name": "both", "adapters": ["semantic", "acoustic"]}
    report = go(made | {"stages": [*made["stages"], second]}, tmp_path)
    assert report.model is not None
    assert list(report.model.adapters) == ["semantic", "acoustic"]
    assert {k.split(".")[1] for k in weights(tmp_path)} == {"semantic"}
    assert {k.split(".")[1] for k in weights(tmp_path, "2-both")} == {"semantic", "acoustic"}
    first, last = weights(tmp_path), weights(tmp_path, "2-both")
    moved = [float((first[k] - last[k]).abs().max()) for k in first if "weight" in k]
    assert 0 < max(moved) < 0.02  # it went on from there
    assert same(load_file(tmp_path / "2-both" / "weights.safetensors"), last)


def test_cached_features_change_nothing(world: Path, tmp_path: Path) -> None:
    go(recipe(world), tmp_path / "plain")
    report = go(recipe(world, cache={"dtype": "float32"}), tmp_path / "cached")
    assert len(list((tmp_path / "cached" / "features").glob("*/*.safetensors"))) == 8
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "cached")
    assert all(torch.allclose(plain[key], cached[key], atol=1e-4) for key in plain)
    assert report.stages[0].steps == 6


def test_augmented_training_runs(world: Path, tmp_path: Path) -> None:
    go(recipe(world, max_steps=2, augment={"speed": [0.9, 1.1], "gain": 6, "bands": 1}), tmp_path)


def test_sources_and_evaluators_of_ones_own(world: Path, tmp_path: Path) -> None:
    class Beeps:
        def __init__(self, *, count: int = 4) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> Sample:
            audio = torch.from_numpy(toy.tone(300 + 50 * index, 0.2))
            return Sample("low", "What do you hear ?", audio, 16000)

    made = recipe(
        world, evaluate={"eval_steps": 3, "evaluators": ["score"], "best_metric": "score"}
    )
    made["stages"][0]["data"] = [{"source": "beeps", "options": {"count": 6}}]
    seen: list[Any] = []

    def score(model: Any) -> dict[str, float]:
        seen.append(model)
        return {"score": float(len(seen))}

    report = go(made, tmp_path, sources={"beeps": Beeps}, evaluators={"score": score})
    assert report.stages[0].metrics["eval_score"] == 2.0
    assert (tmp_path / "1-align" / "best" / "weights.safetensors").is_file()
    made["stages"][0]["data"][0]["options"] = {"counts": 6}
    with pytest.raises(DataError, match=r"beeps.*counts"):
        go(made, tmp_path / "b", sources={"beeps": Beeps}, evaluators={"score": score})
    with pytest.raises(TrainingError, match="no evaluator 'score'"):
        go(recipe(world, evaluate={"evaluators": ["score"]}), tmp_path / "c")


# --- auxiliary losses --------------------------------------------------------------------------


def embedding() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(12, 8)


def test_transcripts_are_disturbed_in_training_only() -> None:
    embed = embedding()
    embedder = TranscriptEmbedder(embed, blank=3, text_mixup=1.0, text_noise=0.5)
    ids = torch.tensor([[4, 5, 6], [7, 0, 0]])
    transcripts = (ids, torch.tensor([3, 1]), torch.zeros_like(ids))
    plain = embedder.eval()(*transcripts)
    assert torch.equal(plain.values[0], embed(ids[0]))
    assert not bool(plain.values[1, 1:].any())
    noisy = embedder.train()(*transcripts)
    assert not torch.allclose(noisy.values[0], plain.values[0], atol=0.01)
    assert not bool(noisy.values[1, 1:].any())
    assert not list(embedder.parameters())  # the table belongs to the backbone alone


def test_ctc_is_smaller_where_the_words_are_said_in_order() -> None:
    embed = embedding().requires_grad_(False)
    ctc = CTCLoss(embed, {"semantic": 0.5}, blank=0)
    words = [{"semantic": torch.tensor([4, 5, 5])}, {"*": torch.tensor([6])}]

    def cost(rows: list[list[int]], counts: list[int]) -> float:
        said = {"semantic": Embeds(embed(torch.tensor(rows)), torch.tensor(counts))}
        return float(ctc(said, words))

    right = cost([[0, 4, 5, 0, 5, 0], [6, 0, 0, 0, 0, 0]], [6, 2])
    swapped = cost([[0, 5, 4, 0, 5, 0], [6, 0, 0, 0, 0, 0]], [6, 2])
    assert right < 0.2 < swapped
    # frames past a row's length say nothing
    assert cost([[0, 4, 5, 0, 5, 0], [6, 0, 7, 8, 9, 4]], [6, 2]) == pytest.approx(right)


def test_ctc_compares_by_direction_and_reaches_the_adapter() -> None:
    embed = embedding().requires_grad_(False)
    ctc = CTCLoss(embed, {"semantic": 1.0}, blank=0, logit_scale=5.0)
    values = torch.randn(1, 6, 8, requires_grad=True)
    said = {"semantic": Embeds(values, torch.tensor([6]))}
    loss = ctc(said, [{"semantic": torch.tensor([4, 5])}])
    table = nn.functional.normalize(embed(torch.tensor([0, 4, 5])), dim=1)
    logits = 5.0 * nn.functional.normalize(values, dim=2) @ table.T
    expected = nn.functional.ctc_loss(
        logits.log_softmax(2).transpose(0, 1),
        torch.tensor([1, 2]),
        torch.tensor([6]),
        torch.tensor([2]),
        reduction="sum",
    )
    assert loss.item() == pytest.approx(expected.item() / 2)
    loss.backward()
    assert values.grad is not None and bool(values.grad.any())


def test_match_scale_gives_adapter_outputs_the_rms_of_the_embeddings() -> None:
    source = FeatureSpec(width=16, layers=2, rate=50.0, heads=2)
    counts = torch.tensor([20, 12])
    features = Features(tuple(torch.randn(2, 20, 16) for _ in range(3)), counts, counts)
    table = 0.02 * torch.randn(50, 8)
    for adapter in (Conv(source, 8), QFormer(source, 8, num_queries=4, encoder_layers=[1])):
        scale_to_embeddings(adapter, features, table)
        out = adapter.eval()(features)
        inside = torch.arange(out.values.shape[1]) < out.lengths[:, None]
        assert float(out.values[inside].square().mean().sqrt()) == pytest.approx(0.02, rel=0.05)


def test_nano_answers_trains_on_transcripts_and_on_audio_with_ctc(
    world: Path, tmp_path: Path
) -> None:
    class Lines:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Sample:
            return Sample("one two", "What ?", audio_text="one ? two" if index % 2 else "one two")

    made = recipe(
        world,
        max_steps=2,
        adapters=["semantic"],
        answer_length=[4, 8],
        objective={
            "name": "masked",
            "masking": "count",
            "full_mask_prob": 0.4,
            "normalization": "sample",
        },
        learner=nano(ctc={"semantic": 0.3}, match_scale=["semantic"], header_share=0.3),
    )
    learner = nano(text_mixup=0.6, text_noise=0.5, answer_padding=0.25)
    text = {**made["stages"][0], "name": "language", "train": ["backbone"], "learner": learner}
    text["data"] = [{"source": "lines"}]
    go(made | {"stages": [text, *made["stages"]]}, tmp_path, sources={"lines": Lines})
    assert all(key.startswith("backbone.") for key in weights(tmp_path, "1-language"))
    (row,) = read_log(tmp_path / "2-align" / "log.jsonl")
    assert row["auxiliary"] > 0 and row["loss"] > 0


@pytest.mark.fsdd
def test_an_encoder_learns_by_listening(world: Path, tmp_path: Path) -> None:
    made = recipe(
        world,
        learner={
            "name": "nano-encoder",
            "ctc_weight": 0.2,
            "init_local": True,
            "full_window_share": 0.5,
            "band_mask_share": 0.5,
        },
        train=["encoder"],
        data=[
            {"source": "nano", "options": {"count": 16, "synthetic_voices": False, "max_digits": 2}}
        ],
        optimizer={"name": "muon", "lr": 2e-3, "matrix_lr": 0.02},
        batch_size=4,
        max_steps=8,  # two epochs: every batch comes round again
        logging_steps=4,
    )
    made["spec"]["encoder"] = {
        "name": "tiny",
        "window_seconds": 8.0,
        "width": 32,
        "layers": 2,
        "heads": 2,
    }
    go(made, tmp_path)
    assert all(key.startswith("encoder.") for key in weights(tmp_path))
    losses = [row["loss"] for row in read_log(tmp_path / "1-align" / "log.jsonl")]
    assert losses[-1] < losses[0]


# --- resuming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    go(recipe(world), out)
    return out


def written(checkpoint: Path) -> int:
    """When a checkpoint was written; a run that begins anew writes it again."""
    return (checkpoint / folder.WEIGHTS).stat().st_mtime_ns


@pytest.mark.parametrize("step", [2, 4])
def test_any_checkpoint_resumes_to_the_same_bits(
    world: Path, unbroken: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for note in ("stage.json", "weights.safetensors"):
        (out / "1-align" / note).unlink()
    for later in checkpoints(out / "1-align"):
        if folder.step_of(later) > step:
            shutil.rmtree(later)
    torch.manual_seed(99)  # whatever state the process is in
    before = written(out / "1-align" / "checkpoint-2")
    go(recipe(world), out, resume=True)
    assert same(weights(out), weights(unbroken))
    assert written(out / "1-align" / "checkpoint-2") == before, "it began anew"
    assert [row["step"] for row in read_log(out / "1-align" / "log.jsonl")] == [2, 4, 6]


def test_a_named_checkpoint_is_gone_back_to(world: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for name in ("stage.json", "weights.safetensors"):
        assert (out / "1-align" / name).is_file()
    go(recipe(world), out, resume=out / "1-align" / "checkpoint-2")
    assert same(weights(out), weights(unbroken))


@pytest.mark.parametrize("file", ["optimizer.pt", "weights.safetensors", "scheduler.pt", None])
def test_an_incomplete_newest_checkpoint_falls_back_to_the_one_before(
    world: Path, unbroken: Path, tmp_path: Path, file: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for note in ("stage.json", "weights.safetensors"):
        (out / "1-align" / note).unlink()
    newest = out / "1-align" / "checkpoint-6"
    if file is None:  # as in a folder that was copied in part
        for path in newest.iterdir():
            path.unlink()
    else:
        (newest / file).write_bytes(b"")
    go(recipe(world), out, resume=True)
    assert same(weights(out), weights(unbroken))
    assert f"{newest} is incomplete" in caplog.text


def test_a_run_does_not_go_on_with_other_data(world: Path, unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    made, out = recipe(tmp_path / "world"), tmp_path / "run"
    go(made, out)
    manifest = tmp_path / "world" / "train.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(before)[:-1]))
    with pytest.raises(TrainingError, match=r"train\.json changed since the run .*another --out"):
        go(made, out, resume=True)
    manifest.write_text(before)
    assert same(weights(out), weights(unbroken))
    go(made, out, resume=True)


def test_inputs_of_the_spec_and_moved_recipes_are_compared_by_name(tmp_path: Path) -> None:
    (tmp_path / "spec").mkdir()
    weights_file = tmp_path / "spec" / "weights"
    weights_file.write_text("first")
    made = SimpleNamespace(
        data={"spec": "nano", "stages": [{"data": [{"path": "rows.json"}]}]},
        spec=SimpleNamespace(data={"encoder": {"checkpoint": str(tmp_path / "spec")}}),
    )
    for place in (tmp_path, tmp_path / "moved"):
        place.mkdir(exist_ok=True)
        (place / "rows.json").write_text("[]")
        made.path = place.joinpath
        claim_inputs(tmp_path, made)
    weights_file.write_text("other")
    with pytest.raises(TrainingError, match=r"spec changed since the run"):
        claim_inputs(tmp_path, made)


def test_a_second_run_in_one_folder_is_refused(world: Path, tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run", "diffa train"),
        pytest.raises(DiffaError, match="run is in use by diffa train"),
    ):
        go(recipe(world), tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


def test_a_finished_run_resumes_to_itself(world: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    report = go(recipe(world), out, resume=True)
    assert report.stages[0].steps == 6
    assert same(weights(out), weights(unbroken))


def test_a_killed_run_resumes_to_the_same_bits(world: Path, unbroken: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(world)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HELD + KILLED, str(file), str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not checkpoints(out / "1-align") and time.monotonic() < deadline:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "1-align" / "stage.json").exists()
    before = written(out / "1-align" / "checkpoint-2")
    command = [sys.executable, "-c", KILLED, str(file), str(out), "resume"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert same(weights(out), weights(unbroken))
    assert written(out / "1-align" / "checkpoint-2") == before, "it began anew"


# A run that stops before its fifth step: however late it is killed, it is not over.
HELD = """
import time
from diffa.trainers.trainer import StageTrainer
step = StageTrainer.training_step
def held(self, *given):
    if self.state.global_step == 4:
        time.sleep(600)
    return step(self, *given)
StageTrainer.training_step = held
"""
KILLED = """
import os, sys, torch
torch.set_num_threads(1)
from diffa.trainers import train
train(sys.argv[1], out=sys.argv[2], resume=len(sys.argv) > 3, device="cpu")
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(world: Path, tmp_path: Path) -> None:
    shared = {
        "max_steps": 2,
        "train": ["adapters.semantic"],
        "group_by_length": False,
        "save_steps": 2,
    }
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(world, batch_size=2, **shared)))
    (tmp_path / "train.py").write_text(KILLED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29541", str(tmp_path / "train.py")]
    subprocess.run([*command, str(file), str(tmp_path / "two")], env=environment, check=True)
    go(recipe(world, batch_size=4, **shared), tmp_path / "one")
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.allclose(two[key], one[key], atol=2e-5) for key in one)
    assert (tmp_path / "two" / "1-align" / "checkpoint-2" / "rng_state_1.pth").is_file()


def test_a_dry_run_opens_what_is_evaluated_and_finds_the_checkpoint(
    world: Path, tmp_path: Path
) -> None:
    made = recipe(world, evaluate={"data": [{"path": str(tmp_path / "none.json")}]})
    with pytest.raises(DataError, match=r"there is no manifest .*none.json"):
        go(made, tmp_path / "run", dry_run=True)
    with pytest.raises(TrainingError, match="zzz is no checkpoint of the run"):
        go(recipe(world), tmp_path / "run", dry_run=True, resume="zzz")


def test_a_folder_holds_one_run(world: Path, unbroken: Path) -> None:
    with pytest.raises(TrainingError, match="holds a run already: go on with --resume"):
        go(recipe(world), unbroken)
    with pytest.raises(TrainingError, match=r"differs in stages.0.max_steps"):
        go(recipe(world, max_steps=8), unbroken, resume=True)


def test_a_run_that_never_began_does_not_keep_its_folder(world: Path, tmp_path: Path) -> None:
    wrong = recipe(world)
    wrong["stages"] = [{**wrong["stages"][0], "data": [{"path": str(tmp_path / "none.json")}]}]
    with pytest.raises(DataError, match="there is no manifest"):
        go(wrong, tmp_path / "run")
    assert (tmp_path / "run" / "recipe.json").is_file()
    go(recipe(world), tmp_path / "run")


def test_a_device_that_is_none_is_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cpuu: .*diffa doctor"):
        go(recipe(world), tmp_path, device="cpuu")


def test_resuming_nothing_says_so_and_begins(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(stderr=True, width=200)
    go(recipe(world), tmp_path / "new", resume=True, console=console)
    assert "holds no run to go on with" in capsys.readouterr().err


def test_checkpoints_that_are_not_kept_go(world: Path, tmp_path: Path) -> None:
    go(recipe(world) | {"save_total_limit": 1}, tmp_path)
    assert [path.name for path in checkpoints(tmp_path / "1-align")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_a_disk_that_refuses_leaves_the_last_checkpoint_intact(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    from diffa.trainers.trainer import StageTrainer

    plain: Callable[..., None] = StageTrainer._save_optimizer_and_scheduler

    def failing(self: StageTrainer, place: str) -> None:
        plain(self, place)
        if self.state.global_step == 4:
            raise fault

    monkeypatch.setattr(StageTrainer, "_save_optimizer_and_scheduler", failing)
    with pytest.raises(TrainingError, match=r"checkpoint-2 is intact.*--resume"):
        go(recipe(world), tmp_path / "run")
    stage = tmp_path / "run" / "1-align"
    assert [path.name for path in checkpoints(stage)] == ["checkpoint-2"]
    assert not list(stage.glob(".checkpoint*"))
    monkeypatch.setattr(StageTrainer, "_save_optimizer_and_scheduler", plain)
    go(recipe(world), tmp_path / "run", resume=True)
    assert len(checkpoints(stage)) == 3


def test_a_full_disk_at_the_end_of_a_stage_keeps_its_last_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffa.trainers import run as running

    def full(state: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_weights", full)
    state = {"a": torch.zeros(2)}
    with replacing(tmp_path / "checkpoint-2") as draft:
        (draft / folder.WEIGHTS).write_text("whole")
    with pytest.raises(TrainingError, match=r"No space left.*checkpoint-2 is intact.*--resume"):
        running.keep_weights(state, tmp_path / folder.WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    running.keep_weights(state, tmp_path / folder.WEIGHTS)
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="cannot write"):
        patch.setattr(folder, "save_weights", full)
        running.keep_weights({"a": torch.ones(2)}, tmp_path / folder.WEIGHTS)
    assert torch.equal(load_file(tmp_path / folder.WEIGHTS)["a"], state["a"])


def test_an_unwritable_place_is_told_before_training(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiffaError, match="cannot be written"):
        go(recipe(world), tmp_path / "file" / "run")


def test_replacing_keeps_the_old_folder_until_the_new_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "best"
    with replacing(place) as draft:
        (draft / "a").write_text("old")
    with pytest.raises(ValueError, match="mine"), replacing(place) as draft:
        (draft / "a").write_text("half")
        raise ValueError("mine")
    assert (place / "a").read_text() == "old"
    with replacing(place) as draft:
        (draft / "a").write_text("new")
    assert (place / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


# --- bad rows -----------------------------------------------------------------------------------


def test_bad_rows_stop_or_are_left_out_and_counted(world: Path, tmp_path: Path) -> None:
    rows = json.loads((world / "train.json").read_text())
    rows[2]["target"] = ""
    rows[5]["audio_filepath"] = "absent.wav"
    bad = world / "bad.json"
    bad.write_text(json.dumps(rows))
    made = recipe(world, data=[{"path": str(bad)}])
    with pytest.raises(DataError, match=r"row 3: has an empty answer"):
        go(made, tmp_path / "stop")
    report = go(made, tmp_path / "skip", on_error="skip")
    assert report.stages[0].skipped == 2
    listed = json.loads((tmp_path / "skip" / "1-align" / "skipped.json").read_text())
    assert any("row 3" in line for line in listed) and any("row 6" in line for line in listed)


# --- optimisers, schedules, scores --------------------------------------------------------------


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 8), (2, 8, 32), (1, 12, 12)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.4


def test_muon_is_adamw_where_there_are_no_matrices() -> None:
    def train(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.Tensor:
        p = nn.Parameter(torch.linspace(-1, 1, 7))
        chosen = make([p])
        for _ in range(5):
            chosen.zero_grad()
            (p - 0.3).pow(4).sum().backward()
            chosen.step()
        return p.detach()

    shared = {"lr": 0.05, "weight_decay": 0.1}
    ours = train(lambda ps: Muon([{"params": ps, **shared}], betas=(0.9, 0.95)))
    theirs = train(lambda ps: torch.optim.AdamW(ps, betas=(0.9, 0.95), **shared))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_muon_steps_matrices_along_their_orthogonalised_momentum() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 3))
    start, grads = p.detach().clone(), torch.randn(2, 6, 3)
    group = {"params": [p], "lr": 0.1, "weight_decay": 0.5, "matrices": True}
    made = Muon([group], momentum=0.9)
    expected, kept = start, torch.zeros(6, 3)
    for grad in grads:
        p.grad = grad.clone()
        made.step()
        kept = 0.9 * kept + 0.1 * grad
        turned = orthogonalize((0.1 * grad + 0.9 * kept)[None])[0]
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * turned
    assert torch.allclose(p, expected, atol=1e-5)


def test_muon_turns_the_matrices_of_layers_only() -> None:
    layers = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 4),
            "inner": nn.Linear(4, 6),
            "norm": nn.LayerNorm(6),
            "head": nn.Linear(6, 11, bias=False),
        }
    )
    made = build_optimizer(layers, OptimizerConfig(name="muon", lr=1e-3, matrix_lr=0.01))
    turned = [p for g in made.param_groups if g["matrices"] for p in g["params"]]
    assert [p is layers["inner"].weight for p in turned] == [True]
    decayed = [p for g in made.param_groups if g["weight_decay"] > 0 for p in g["params"]]
    assert all(p.ndim == 2 for p in decayed)


def test_a_schedule_can_hold_its_top() -> None:
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = build_schedule(
        made, ScheduleConfig(warmup_steps=2, stable_ratio=0.5, min_lr_ratio=0.1), 10
    ).lr_lambdas[0]
    expected = [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]
    assert [factor(i) for i in range(11)] == pytest.approx(expected)


def test_log_warmup_follows_deepspeeds_formula() -> None:
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = ScheduleConfig(warmup_steps=4, warmup_type="log")
    factor = build_schedule(made, config, 8).lr_lambdas[0]
    rise = [math.log(step + 1) / math.log(4) for step in range(4)]
    assert [factor(i) for i in range(9)] == pytest.approx([*rise, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert rise[0] == 0.0 and rise[-1] == 1.0
    one = ScheduleConfig(warmup_steps=1, warmup_type="log")  # DeepSpeed divides by log 2 at least
    assert build_schedule(made, one, 4).lr_lambdas[0](0) == 0.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decays", [False, True])
def test_norms_and_biases_decay_only_on_request(name: str, decays: bool) -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    config = OptimizerConfig(
        name=name,  # type: ignore[arg-type]
        weight_decay=0.1,
        decay_norms_and_biases=decays,
    )
    groups = build_optimizer(layers, config).param_groups
    decay = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.1 if decays else 0.0}


def test_muon_resumes_from_its_state() -> None:
    def start() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(5, 7)
        return layer, build_optimizer(layer, OptimizerConfig(name="muon"))

    def step(layer: nn.Linear, made: torch.optim.Optimizer) -> None:
        layer(torch.ones(3, 5)).square().sum().backward()
        made.step()
        made.zero_grad()

    layer, made = start()
    step(layer, made)
    kept, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(made.state_dict())
    step(layer, made)
    other, again = start()
    other.load_state_dict(kept)
    again.load_state_dict(state)
    step(other, again)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("linear", [0.2, 0.6, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant", [0.2, 0.6, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.2, 0.6, 1.0, 0.8536, 0.5, 0.1464, 0.0]),
    ],
)
def test_schedules_rise_and_fall(name: str, values: list[float]) -> None:
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for warmup in (2.0, 1 / 3):
        config = ScheduleConfig(name=name, warmup_steps=warmup)  # type: ignore[arg-type]
        factor = build_schedule(made, config, 6).lr_lambdas[0]
        expected = [(i + 1) / 3 for i in range(2)] + values[2:]
        assert [factor(i) for i in range(7)] == pytest.approx(expected, abs=1e-4)


def test_answers_are_compared_by_words() -> None:
    assert compare(["Two, three."], ["two three"]) == {"exact": 1.0, "error": 0.0}
    found = compare(["one two", "four"], ["one three", "four"])
    assert found == {"exact": 0.5, "error": pytest.approx(1 / 3)}
    assert (
        is_better("loss", 1.0, 2.0)
        and is_better("exact", 2.0, 1.0)
        and is_better("loss", 9.0, None)
    )
    assert not is_better("error", 2.0, 1.0) and not is_better("exact", 1.0, 1.0)


def test_the_first_process_decides_for_all_what_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(held: list[float], src: int) -> None:
        held[0] = 3.0  # what the first process measures

    best = BestWeights(lambda: {"loss": 1.0}, nn.Linear(2, 2), tmp_path, "loss", resume=False)
    best.value = 2.0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", told)
    best(1)  # no better there, though it is here: nothing is kept that others do not keep
    assert best.value == 2.0 and not best.folder.exists()
