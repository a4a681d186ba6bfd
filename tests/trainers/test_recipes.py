"""DIFFA's recipes as they ship, run end to end at a size that a test can train."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.toy import QUIET
from safetensors.torch import load_file

import diffa
from diffa import assembly
from diffa.data.mixture import Mixture
from diffa.data.samples import DataError, Sample
from diffa.errors import SpecError
from diffa.trainers import Recipe, Report, train
from diffa.trainers import run as running
from diffa.trainers.config_sections import LearnerConfig, StageConfig
from diffa.trainers.estimate import _bytes_per_slot, estimate, saved_bytes
from diffa.trainers.progress import read_log
from diffa.trainers.run_context import RunContext, load_questions, open_data
from diffa.trainers.trainable import trained_state


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, eight tones, and manifests of questions and preferences about them."""
    return toy.write_world(tmp_path_factory.mktemp("recipes"), rejected="three four five")


def small(name: str, world: Path) -> list[str]:
    """Changes that leave a shipped recipe's stages as they are and make everything small."""
    shipped = Recipe.read(name)
    spec = toy.spec(world / "tokenizer")
    spec["encoder"] = {"name": "tiny", "window_seconds": 1.0, "width": 16, "layers": 2, "heads": 2}
    spec["adapters"] = shipped.spec.data["adapters"]
    spec["adapters"]["acoustic"] |= {"num_queries": 4, "intermediate_size": 16}
    spec["adapters"]["prompt"]["num_embeddings"] = 2
    spec["backbone"]["lora"] = shipped.spec.data["backbone"].get("lora")
    changes = {"spec": spec, "devices": 1, "num_workers": 0}
    for number, stage in enumerate(shipped.stages):
        file = "pairs.json" if stage.learner.name == "preferences" else "train.json"
        for entry in range(len(stage.data)):
            changes[f"stages.{number}.data.{entry}.path"] = str(world / file)
        # a second entry would repeat the first one's few rows
        sizes = {
            "devices": None,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "epochs": 1,
            "save_steps": 1,
            "logging_steps": 1,
        }
        changes |= {f"stages.{number}.{key}": value for key, value in sizes.items()}
        changes[f"stages.{number}.optimizer.lr"] = 5e-3
        changes[f"stages.{number}.schedule.warmup_steps"] = 1
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


def go(name: str, world: Path, out: Path, **options: Any) -> Report:
    overrides = small(name, world)
    return train(name, out=out, overrides=overrides, console=QUIET, device="cpu", **options)


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted(out.glob("*-*/weights.safetensors"))
    return {path.parent.name: load_file(path) for path in files}


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    pairs = [(a[stage][key], b[stage][key]) for stage in a for key in a[stage]]
    return a.keys() == b.keys() and all(torch.equal(*pair) for pair in pairs)


BEGINNINGS: dict[str, dict[str, torch.Tensor]] = {}
"""What learns as every stage of ``second`` begins."""


@pytest.fixture(scope="module")
def second(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """DIFFA-2's whole curriculum, unbroken."""
    out, train_stage = tmp_path_factory.mktemp("second") / "run", running._train_stage

    def noted(context: Any, seen: Any, number: int, start: Path | None) -> Any:
        name = context.stage_folder(number).name
        BEGINNINGS[name] = {key: value.clone() for key, value in trained_state(seen).items()}
        return train_stage(context, seen, number, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_train_stage", noted)
        return out, go("diffa-2", world, out)


def test_diffa_1_runs_from_end_to_end(world: Path, tmp_path: Path) -> None:
    report = go("diffa-1", world, tmp_path)
    assert [stage.name for stage in report.stages] == ["transcribe", "instruct"]
    trained = {name: {part(key) for key in found} for name, found in weights(tmp_path).items()}
    assert trained == {
        "1-transcribe": {"prompt", "semantic"},
        "2-instruct": {"acoustic", "semantic"},
    }
    answer = diffa.load(tmp_path / "model").answer(world / "tone0.wav", "What ?", max_tokens=2)
    assert answer.tokens.shape == (2,)


def test_diffa_2_runs_from_end_to_end(world: Path, second: tuple[Path, Report]) -> None:
    out, report = second
    assert [stage.name for stage in report.stages] == ["transcribe", "align", "tune", "prefer"]
    trained = {name: {part(key) for key in found} for name, found in weights(out).items()}
    assert trained == {
        "1-transcribe": {"prompt", "semantic"},
        "2-align": {"acoustic", "semantic"},
        "3-tune": {"acoustic", "semantic", "lora"},
        "4-prefer": {"acoustic", "semantic", "lora"},
    }
    logs = {name: read_log(out / name / "log.jsonl") for name in trained}
    assert logs["4-prefer"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    rows = [row for found in logs.values() for row in found if "loss" in row]
    # two short answers may be left whole: such a step asks for nothing and has no accuracy
    assert all(row["loss"] > 0 for row in rows if "accuracy" in row)
    assert all(row["loss"] == 0 for row in rows if "accuracy" not in row)


def part(key: str) -> str:
    return "lora" if ".lora_" in key else key.split("adapters.")[1].split(".")[0]


def test_each_stage_begins_where_the_last_one_ended(second: tuple[Path, Report]) -> None:
    found = weights(second[0])
    assert list(BEGINNINGS) == list(found)
    ended: dict[str, torch.Tensor] = {}
    for name, begun in BEGINNINGS.items():
        known = begun.keys() & ended.keys()
        assert known or name == "1-transcribe"
        assert all(torch.equal(begun[key], ended[key]) for key in known), name
        assert all(bool((found[name][key] != begun[key]).any()) for key in begun), name
        ended |= found[name]
    ups = [key for key in BEGINNINGS["4-prefer"] if ".lora_B." in key]
    assert ups and all(BEGINNINGS["4-prefer"][key].any() for key in ups)


def test_the_trained_model_is_saved_with_its_pairs(
    world: Path, second: tuple[Path, Report]
) -> None:
    out, report = second
    live, merged = diffa.load(out / "model"), diffa.load(out / "model", merge=True)
    assert set(live.spec.data["train"]) == {"adapters", "backbone.lora"}
    assert report.model is not None
    tokens = torch.arange(7, 19)[None]
    with torch.no_grad():
        expected, *found = (
            m.logits(m.backbone.embed(tokens)) for m in (report.model, live, merged)
        )
    assert torch.equal(expected, found[0])
    assert torch.allclose(expected, found[1], atol=1e-4)


def test_pairs_that_only_a_stage_trains_have_all_their_digits(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "_resolve_dtype", lambda *_: torch.bfloat16)  # as on a GPU
    made = Recipe.read("diffa-2").change(small("diffa-2", world))
    assert made.spec.data["train"] == ["adapters"]
    context = RunContext(
        recipe=made, out=Path("nowhere"), device=torch.device("cpu"), console=QUIET
    )
    model = running.build_model(context, context.device)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.backbone.lora.parameters()} == {torch.float32}


# --- resuming -----------------------------------------------------------------------------------


def steps_done(out: Path) -> int:
    """Steps that all stages have logged so far."""
    return sum(len(read_log(path)) for path in out.glob("*/log.jsonl"))


def unending(world: Path, out: Path) -> None:
    """A run that waits before it is over: however late it is killed, it is not too late."""
    running.save = lambda *_: time.sleep(600)
    go("diffa-2", world, out)


@pytest.mark.forks
def test_a_run_killed_at_a_random_step_of_any_stage_ends_the_same(
    world: Path, second: tuple[Path, Report], tmp_path: Path
) -> None:
    out, total = tmp_path / "run", sum(stage.steps for stage in second[1].stages)
    step = random.SystemRandom().randrange(1, total)
    # forked: a process that has not everything to import again
    process = multiprocessing.get_context("fork").Process(target=unending, args=(world, out))
    process.start()
    deadline = time.monotonic() + 300
    while steps_done(out) < step and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "model").exists(), "the run was over before it was killed"
    go("diffa-2", world, out, resume=True)
    assert same(out, second[0]), f"killed at step {step} of {total}"


@pytest.mark.parametrize("stage", ["3-tune", "4-prefer"])
def test_a_stage_resumes_in_its_middle_against_the_same_reference(
    world: Path, second: tuple[Path, Report], tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(second[0], out)
    late = [folder for folder in out.glob("*-*") if folder.is_dir() and folder.name >= stage]
    for folder in late:
        for note in ("stage.json", "weights.safetensors"):
            (folder / note).unlink()
        if folder.name > stage:
            shutil.rmtree(folder)
    kept = sorted((out / stage).glob("checkpoint-*"))
    shutil.rmtree(kept[-1])  # the last step is taken again
    note = kept[-2] / "trainer_state.json"
    before = note.stat().st_mtime_ns
    go("diffa-2", world, out, resume=True)
    assert same(out, second[0])
    assert note.stat().st_mtime_ns == before, "it began anew"


# --- plans --------------------------------------------------------------------------------------


def test_a_dry_run_of_the_full_scale_says_what_it_takes() -> None:
    first = train("diffa-1", out="nowhere", dry_run=True, console=QUIET).stages
    # the published checkpoint is named after its 30,270 steps
    assert [stage.steps for stage in first] == [21970, 30270]
    assert [stage.trained for stage in first] == [14_451_200, 36_621_056]
    hours = [stage.estimate.hours for stage in first if stage.estimate]
    assert hours == pytest.approx([960, 127], rel=1e-2)
    stages = train("diffa-2", out="nowhere", dry_run=True, console=QUIET).stages
    assert stages[3].steps == 1880  # 3,000 pairs in whole steps of 16 GPUs x 1, 10 epochs
    learning = [stage.trained for stage in stages]
    assert learning == [36_474_368, 84_285_440, 98_965_504, 98_965_504]
    estimates = [stage.estimate for stage in stages if stage.estimate]
    assert all(e.tokens > 0 and e.audio_embeddings > 0 for e in estimates)
    # 8 billion weights in bfloat16 and the encoder; fits the 80 GB of the paper's cards
    assert all(16 < e.memory.weights / 2**30 < 20 for e in estimates)
    assert all(e.memory.total < 80e9 for e in estimates)
    taken = [(e.memory.gradients, e.memory.optimizer) for e in estimates]
    assert taken == [(4 * count, 2 * 4 * count) for count in learning]  # AdamW's two moments
    tuned, preferred = estimates[2].memory, estimates[3].memory
    assert preferred.weights - tuned.weights == 4 * learning[3]  # the reference


def test_a_plan_counts_what_is_there(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*small("diffa-2", world), "precision=float32"]
    rows: list[int] = []
    monkeypatch.setattr(
        "diffa.trainers.estimate._backbone_activations", lambda _, n, *a, **b: rows.append(n) or 0
    )
    report = train("diffa-2", out="nowhere", dry_run=True, overrides=overrides, console=QUIET)
    found = [stage.estimate for stage in report.stages]
    assert all(one is not None and not one.approximate for one in found)
    align = found[1]
    assert align is not None
    assert align.hours == pytest.approx(8 * 0.4 / 3600)
    model = diffa.build(Recipe.read("diffa-2").change(overrides).spec)
    row = len(model.chat_format.encode_example("What do you hear ?", "high").tokens)
    # seven of these, and one of the instructions for transcription
    assert 7 * row < align.tokens < 8 * row + 20
    # 0.4 s are 20 frames: four queries, and one embedding of every four frames
    assert align.audio_embeddings == 8 * (4 + 5)
    tune, prefer = found[2], found[3]
    assert tune is not None and prefer is not None
    assert prefer.audio_embeddings == 2 * align.audio_embeddings  # each recording for two answers
    assert prefer.tokens > 1.9 * tune.tokens
    assert rows == [2, 2, 2, 2 * 2 * 4]  # four draws of both answers


def test_activations_are_counted_as_autograd_keeps_them() -> None:
    layer = torch.nn.Linear(8, 4)
    x = torch.randn(16, 8, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x).relu()) == 4 * (16 * 8 + 16 * 4)


def test_what_a_backbone_takes_does_not_depend_on_what_was_asked_before(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError

    spec = toy.spec(world / "tokenizer")
    one, other = (diffa.build(spec, device="meta").backbone for _ in range(2))
    assert _bytes_per_slot(one, True, True) < _bytes_per_slot(one, False, True)
    assert _bytes_per_slot(one, False, True) == _bytes_per_slot(other, False, True)
    monkeypatch.setattr(one, "forward", refuse)
    assert _bytes_per_slot(one, False, False) > 0  # told by its layers
    assert not one.training


def packing(share: float) -> StageConfig:
    """A stage that packs the questions of a share of its batches."""
    learner = LearnerConfig(options={"question_packing": share})
    return StageConfig(train=["adapters"], learner=learner)


def test_questions_about_one_recording_are_read_with_it_unless_they_are_packed(world: Path) -> None:
    asked = Sample(
        "high", audio=torch.zeros(6400), rate=16000, extra_questions=(("?", "low"), ("?", "high"))
    )
    model = diffa.build(toy.spec(world / "tokenizer"), device="meta")
    mixed = Mixture([[asked] * 4], [1.0], batch=1, micro=1)  # type: ignore[list-item]
    apart, half, packed = (
        estimate(model, packing(share), mixed, half=False) for share in (0, 0.5, 1)
    )
    assert packed.audio_embeddings == 4 * 5
    assert (
        apart.audio_embeddings == 3 * packed.audio_embeddings
        and half.audio_embeddings == 2 * packed.audio_embeddings
    )
    assert apart.tokens == half.tokens == packed.tokens
    assert apart.memory.activations == half.memory.activations  # the larger batch counts
    assert apart.memory.activations > packed.memory.activations


# --- questions ----------------------------------------------------------------------------------


def test_instructions_come_from_a_file_and_vary(world: Path, tmp_path: Path) -> None:
    from diffa.data.manifest import Manifest

    made = Recipe.read("diffa-2")
    shipped = load_questions("transcribe", made)
    assert len(shipped) == len(set(shipped)) == 25
    (tmp_path / "own.txt").write_text("Say it .\n\nWrite it .\n")
    own = load_questions(str(tmp_path / "own.txt"), made)
    assert own == ["Say it .", "Write it ."]
    data = Manifest(world / "train.json", target="transcription", questions=own)
    asked = {data.at(0, step / 50).question for step in range(50)}
    assert asked == set(own)
    assert data.at(3, 0.25) == data.at(3, 0.25)
    with pytest.raises(DataError, match=r"questions: .* cannot be read"):
        load_questions("absent.txt", made)


def test_a_stage_asks_the_questions_that_it_names(world: Path) -> None:
    made = Recipe.read("diffa-2").change(small("diffa-2", world))
    context = RunContext(
        recipe=made, out=Path("nowhere"), device=torch.device("cpu"), console=QUIET
    )
    (source,), _ = open_data(made.stages[0].data, context, paired=False)
    asked = {source.at(0, step / 50).question for step in range(50)}
    assert len(asked) > 10 and asked <= set(load_questions("transcribe", made))


def test_a_plan_says_which_manifests_it_took_on_trust(capsys: pytest.CaptureFixture[str]) -> None:
    train("diffa-1", out="none", dry_run=True, device="cpu")
    told = capsys.readouterr().err
    assert "librispeech.json does not exist: the plan assumes its 281,241 expected rows" in told


@pytest.mark.parametrize(
    ("size", "message"),
    [("{rows: 0, hours: 1}", "must be above 0"), ("{rows: 5}", "give rows and hours")],
)
def test_the_expected_size_of_a_manifest_is_checked(size: str, message: str) -> None:
    with pytest.raises(SpecError, match=rf"stages.0.data.0.expected_size: {message}"):
        Recipe.read("diffa-2").change([f"stages.0.data.0.expected_size={size}"])


def test_shipped_recipes_take_the_released_settings_where_sources_differ() -> None:
    first, second = Recipe.read("diffa-1").config, Recipe.read("diffa-2").config
    warmup = [(s.schedule.warmup_steps, s.schedule.warmup_type) for s in first.stages]
    assert warmup == [(1000, "log"), (2000, "log")]  # DeepSpeed's WarmupDecayLR
    assert [s.schedule.warmup_steps for s in second.stages] == [1000] * 4
    devices = [s.devices or second.devices for s in second.stages]
    batches = [s.batch_size * d for s, d in zip(second.stages, devices, strict=True)]
    assert batches == [20 * 64, 3 * 64, 3 * 64, 1 * 16]
    stages = [*first.stages, *second.stages]
    assert not any(s.optimizer.decay_norms_and_biases for s in stages)
