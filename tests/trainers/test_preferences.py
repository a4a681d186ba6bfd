"""Preference optimisation: pairs as rows, the reference, shared masks, a stage that learns."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.toy import QUIET

import diffa
from diffa.data.collate import Batch, Collate
from diffa.data.manifest import Manifest
from diffa.data.rows import AnswerTransform, AudioTransform, PreferenceTransform
from diffa.data.samples import DataError, Sample
from diffa.errors import SpecError
from diffa.objectives.vrpo import VRPO
from diffa.trainers import Recipe, train
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.learners import PreferenceLearner
from diffa.trainers.progress import read_log
from diffa.trainers.run import build_model
from diffa.trainers.run_context import RunContext
from diffa.trainers.stage import build_trainer
from diffa.trainers.trainable import set_trainable, stage_model
from diffa.types import Vocab

VOCAB = Vocab(size=30, eos=28, pad=28, mask=29)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, eight tones, and preferences between the two words for them."""
    more = {"chosen": "not read", "rejected": "three four five", "dpo_source": "toy"}
    place = toy.write_world(tmp_path_factory.mktemp("preferences"), **more)
    rows = json.loads((place / "pairs.json").read_text())
    rows[2]["rejected"] = "three four five three four five"
    (place / "pairs.json").write_text(json.dumps(rows))
    return place


def spec(world: Path, **objective: Any) -> dict[str, Any]:
    made = toy.spec(world / "tokenizer")
    made["encoder"] = {"name": "tiny", "window_seconds": 1.0, "width": 16, "layers": 2, "heads": 2}
    made["adapters"] = {"acoustic": {"name": "qformer", "num_queries": 4}, **made["adapters"]}
    made["backbone"]["lora"] = {"rank": 4}
    made["objective"] = {"name": "vrpo", **objective}
    return made


def policy(world: Path, **objective: Any) -> PreferenceLearner:
    torch.manual_seed(0)
    model = diffa.build(spec(world, **objective))
    set_trainable(model, ["adapters", "backbone.lora"])
    return PreferenceLearner(model, StageConfig()).train()


def batch(world: Path, model: Any, rows: list[int]) -> Batch:
    hearing = AudioTransform(model.encoder.sample_rate)
    make = PreferenceTransform(
        AnswerTransform(model.chat_format, model.backbone.vocab, hearing), hearing
    )
    data = Manifest(world / "pairs.json", pairs=True)
    made = [make(data[i], 100 + i) for i in rows]
    return Collate(model.backbone.vocab, learn_padding=False)(made)


def move(learner: PreferenceLearner) -> None:
    """Take the policy away from its reference."""
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in learner.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=drawn))


# --- the objective ------------------------------------------------------------------------------


def drawn(rule: VRPO, seeds: list[int], apart: bool = False) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12) % 20
    answer = torch.arange(12) >= torch.tensor([[3], [5]])
    return rule.draws(tokens, answer, torch.tensor(seeds), apart=apart).masked


def test_every_draw_hides_its_own_count_of_answer_tokens() -> None:
    rule = VRPO(VOCAB, samples=400)
    masked = drawn(rule, [5, 6]).view(400, 2, 12)
    assert not masked[:, 0, :3].any() and not masked[:, 1, :5].any()
    counts = torch.bincount(masked[:, 0].sum(1), minlength=10)
    # each of 1..9 about 400 / 9 times
    assert counts[0] == 0 and counts[1:].min() > 25 and counts[1:].max() < 65


def test_answers_draw_by_their_own_seeds_and_apart_from_the_reference() -> None:
    rule = VRPO(VOCAB, samples=8)
    assert torch.equal(drawn(rule, [5, 6]), drawn(rule, [5, 6]))
    other = drawn(rule, [5, 7]).view(8, 2, 12)
    assert torch.equal(other[:, 0], drawn(rule, [5, 6]).view(8, 2, 12)[:, 0])
    assert not torch.equal(other[:, 1], drawn(rule, [5, 6]).view(8, 2, 12)[:, 1])
    assert not torch.equal(drawn(rule, [5, 6]), drawn(rule, [5, 6], apart=True))


def test_a_draw_weighs_one_over_the_share_it_hides_and_at_most_one_over_eps() -> None:
    tokens, answer, seeds = torch.zeros(1, 8).long(), torch.ones(1, 8).bool(), torch.tensor([5])
    for eps, most in ((1e-3, 8.0), (0.25, 4.0)):
        noised = VRPO(VOCAB, samples=60, eps=eps).draws(tokens, answer, seeds)
        due = (8 / noised.masked.sum(1, keepdim=True)).clamp(max=most).expand(60, 8)
        torch.testing.assert_close(noised.weights[noised.masked], due[noised.masked])
        assert float(noised.weights.max()) == most


def test_a_pair_costs_what_the_paper_says() -> None:
    rule = VRPO(VOCAB, beta=0.2)
    found = rule.compare(torch.tensor([-5.0, -9.0]), torch.tensor([-6.0, -7.0]))
    assert float(found.margin) == pytest.approx(0.2 * (1 + 2))
    assert float(found.loss) == pytest.approx(math.log(1 + math.exp(-0.6)))


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"beta": 0.0}, {"sft_weight": -0.1}, {"eps": 0.0}]
)
def test_impossible_options_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        VRPO(VOCAB, **options)


# --- the data -----------------------------------------------------------------------------------


def test_a_pair_is_two_rows_about_one_recording(world: Path) -> None:
    model = policy(world).model
    made = batch(world, model, [0, 1, 2])
    assert made.audio_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.audio is not None and len(made.audio) == 3
    text = [model.chat_format.tokenizer.decode(made.tokens[i][made.answer[i]]) for i in range(6)]
    assert "high" in text[0] and "three four five" in text[1] and "low" in text[2]
    assert made.row_lengths.tolist() == [s for row in (0, 1, 2) for s in sizes(made, row)]
    assert made.row_lengths[0] != made.row_lengths[1]  # no padding counts
    assert made.seeds.unique().numel() == 6


def sizes(made: Batch, pair: int) -> list[int]:
    return [int(made.answer[i].nonzero().max()) + 1 for i in (2 * pair, 2 * pair + 1)]


def test_rows_without_a_pair_are_told(world: Path) -> None:
    rows = json.loads((world / "pairs.json").read_text())
    del rows[1]["rejected"]
    rows[3]["rejected"] = " high" if rows[3]["target"] == "high" else " low"
    (world / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"row 2: has no rejected.*\n.*row 4: rejects the answer"):
        Manifest(world / "bad.json", pairs=True)
    assert len(Manifest(world / "bad.json")) == 8
    hearing = AudioTransform(16000)
    make = PreferenceTransform(AnswerTransform(None, VOCAB, hearing), hearing)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a sample has no rejected answer"):
        make(Sample("high"), 0)


# --- the learner --------------------------------------------------------------------------------


def test_the_first_loss_is_log_two(world: Path) -> None:
    learner = policy(world)
    parts = learner(batch(world, learner.model, [0, 1]))
    assert (parts.sum / parts.weight).item() == pytest.approx(math.log(2), abs=1e-6)
    assert parts.metrics is not None and float(parts.metrics["margin"]) == 0.0
    assert float(parts.num_correct / parts.num_tokens) == 0.5


def test_the_reference_stays_and_comes_back(world: Path) -> None:
    learner = policy(world)
    first = copy.deepcopy(learner.model.state_dict())
    move(learner)
    moved = copy.deepcopy(learner.model.state_dict())
    with learner.reference.in_place():
        now = learner.model.state_dict()
        assert all(torch.equal(now[key], first[key]) for key in first)
    now = learner.model.state_dict()
    assert all(torch.equal(now[key], moved[key]) for key in moved)
    assert not any("reference" in key for key in learner.state_dict())


def test_a_pair_is_measured_alike_alone_and_beside_longer_ones(world: Path) -> None:
    learner = policy(world, samples=3)
    move(learner)
    together = batch(world, learner.model, [0, 2])
    assert (
        int(together.row_lengths[0]) < int(together.row_lengths[1]) < int(together.row_lengths[3])
    )
    apart = [batch(world, learner.model, [i]) for i in (0, 2)]
    later = torch.tensor([0, 0, 3, 3])  # as where a prompt has its question before the audio
    together = together._replace(audio_at=together.audio_at + later)
    apart[1] = apart[1]._replace(audio_at=apart[1].audio_at + 3)
    both = learner(together).metrics
    alone = [learner(made).metrics for made in apart]
    for name in both:
        assert float(both[name]) == pytest.approx(sum(float(a[name]) for a in alone), abs=2e-3)


def test_gradients_follow_the_margin(world: Path) -> None:
    learner = policy(world, beta=0.5, sft_weight=0.0)
    made = batch(world, learner.model, [0])
    learning = [p for p in learner.parameters() if p.requires_grad]
    found = torch.autograd.grad(learner(made).sum, learning, allow_unused=True)
    noised = learner.model.objective.draws(made.tokens, made.answer, made.seeds)
    bounds = learner._bounds(made, noised)
    # at the reference the sigmoid is a half
    expected = torch.autograd.grad(-0.25 * (bounds[0] - bounds[1]), learning, allow_unused=True)
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert sum(float(b.abs().sum()) for _, b in pairs) > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_the_chosen_answers_own_loss_is_per_token_of_theirs(world: Path) -> None:
    learner = policy(world, samples=2, sft_weight=0.5)
    made = batch(world, learner.model, [0, 1])
    noised = learner.model.objective.draws(made.tokens, made.answer, made.seeds)
    with torch.no_grad():
        bounds = learner._bounds(made, noised)
        lengths = made.answer.sum(1)
        assert lengths[0] != lengths[1] and abs(float(bounds[0] - bounds[1])) > 0.1
        due = 0.5 * (-bounds[0] / lengths[0] - bounds[2] / lengths[2])
        assert float(learner(made).auxiliary) == pytest.approx(float(due), rel=1e-5)
        assert float(policy(world)(made).auxiliary) == 0.0


def test_masks_apart_move_the_margin_at_once(world: Path) -> None:
    learner = policy(world, shared_masks=False)
    parts = learner(batch(world, learner.model, [0, 1]))
    assert parts.metrics is not None and abs(float(parts.metrics["margin"])) > 1e-3


# --- the stage ----------------------------------------------------------------------------------


def recipe(world: Path, **changes: Any) -> dict[str, Any]:
    stage = {
        "name": "prefer",
        "learner": "preferences",
        "data": [{"path": str(world / "pairs.json")}],
        "train": ["adapters", "backbone.lora"],
        "max_steps": 12,
        "batch_size": 4,
        "save_steps": 12,
        "logging_steps": 4,
        "optimizer": {"lr": 1e-2},
        "schedule": {"name": "constant"},
    }
    made = spec(world, samples=4, beta=1.0, sft_weight=0.05)
    return {"spec": made, "seed": 1, "stages": [stage | changes]}


def test_a_stage_learns_what_is_preferred(world: Path, tmp_path: Path) -> None:
    held = [{"path": str(world / "pairs.json")}]
    made = recipe(
        world, evaluate={"data": held, "eval_steps": 12, "max_samples": 8, "generate": False}
    )
    report = train(made, out=tmp_path, console=QUIET, device="cpu")
    log = [row for row in read_log(tmp_path / "1-prefer" / "log.jsonl") if "margin" in row]
    assert log[0]["loss"] > log[-1]["loss"] < 0.45
    assert log[-1]["accuracy"] > 0.8 and log[-1]["margin"] > 0.6
    assert report.stages[0].metrics["eval_accuracy"] > 0.8
    assert {"chosen", "rejected", "auxiliary"} <= log[-1].keys()


def test_a_stage_alters_a_recording_once_for_both_answers_and_learns_no_padding(
    world: Path,
) -> None:
    stage = Recipe(recipe(world, augment={"speed": [0.5]})).stages[0]
    model = policy(world).model
    learner = PreferenceLearner(model, stage)
    make, data = learner.row_transform(training=True), Manifest(world / "pairs.json", pairs=True)
    rows = [make(data[i], 100 + i) for i in (0, 2)]
    assert [len(row.audio) for row in rows] == [2 * 6400] * 2  # 0.4 s, half as fast
    made = learner.collator()(rows)
    assert made.answer.sum(1).tolist() == batch(world, model, [0, 2]).answer.sum(1).tolist()
    assert int(made.row_lengths.min()) < made.tokens.shape[1]


def test_a_step_follows_the_chosen_answers_own_loss_as_well(world: Path, tmp_path: Path) -> None:
    made = Recipe(
        recipe(world, max_steps=1, logging_steps=1, batch_size=2)
        | {"spec": spec(world, sft_weight=0.5)}
    )
    context = RunContext(recipe=made, out=tmp_path, device=torch.device("cpu"), console=QUIET)
    seen = stage_model(build_model(context, context.device), made.stages[0])
    running = build_trainer(seen, made.stages[0], 0, context)
    learning = [p for p in running.model.parameters() if p.requires_grad]
    parts = running.model(
        running.data_collator([running.train_dataset[i] for i in (0, 1)])["batch"]
    )
    grads = torch.autograd.grad((parts.sum + parts.auxiliary) / parts.weight, learning)
    expected = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    running.train()
    (logged,) = [row for row in running.state.log_history if "grad_norm" in row]
    assert logged["grad_norm"] == pytest.approx(expected.item(), rel=1e-4)
    assert logged["auxiliary"] == pytest.approx(float(parts.auxiliary.detach()) / 2, rel=1e-5)


def test_kind_and_objective_must_agree(world: Path) -> None:
    made = recipe(world)
    with pytest.raises(SpecError, match=r"stages.0.objective: compares no pairs"):
        Recipe(recipe(world, objective="masked"))
    with pytest.raises(SpecError, match=r"stages.0.learner: .* use learner: preferences"):
        Recipe(recipe(world, learner="answers"))
    del made["spec"]["backbone"]["lora"]
    with pytest.raises(SpecError, match=r"stages.0.train: unknown part 'backbone.lora'"):
        Recipe(made)
