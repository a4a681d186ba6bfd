"""Learners are found among installed packages; their constructors are their options' schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.fakes import install, site_packages
from helpers.toy import QUIET

import diffa
from diffa.data.samples import Sample
from diffa.errors import SpecError
from diffa.spec import registry
from diffa.trainers import Recipe, train
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config_sections import LearnerConfig, StageConfig
from diffa.trainers.learners import AnswerLearner, Learner, PreferenceLearner, StageCost
from diffa.trainers.progress import read_log

SMOOTH = """
from typing import ClassVar

import torch

from diffa.trainers.config_sections import SHARE, check_range
from diffa.trainers.learners import AnswerLearner


class Smooth(AnswerLearner):
    '''Add a penalty on the norm of the adapters' embeddings, and count its calls.'''

    generates: ClassVar[bool] = False

    def __init__(self, model, stage, sources, cache=None, *, penalty: float = 0.0):
        super().__init__(model, stage, cache)
        self.penalty, self.num_sources, self.prepared = penalty, len(sources), None
        self.scale = torch.nn.Parameter(torch.ones(()))

    def prepare(self, stream, *, seed):
        self.prepared = (len(stream), seed)

    def forward(self, batch):
        assert self.prepared == (4, 3) and self.num_sources == 1
        loss = super().forward(batch)
        embeds = self.model.adapt(self.features(batch)).values
        norm = self.scale * embeds.square().mean()
        weight = loss.weight.detach()
        return loss._replace(
            auxiliary=self.penalty * norm * weight, metrics={"norm": norm.detach() * weight}
        )

    @classmethod
    def check(cls, stage, path, spec, objective, report):
        super().check(stage, path, spec, objective, report)
        penalty = stage.learner.options.get("penalty")
        check_range(penalty, SHARE, f"{path}.learner.penalty", report)
"""


@pytest.fixture
def smooth(tmp_path, monkeypatch):
    """An installed package that offers the learner ``smooth``."""
    for site in site_packages(tmp_path / "site", monkeypatch):
        points = {"learner": {"smooth": "acme_smooth:Smooth"}}
        install(site, "acme-smooth", points, {"acme_smooth": SMOOTH})
        registry.clear_scan()
        yield site


def recipe(world: Path, learner: Any, **changes: Any) -> dict[str, Any]:
    stage = {
        "name": "align",
        "learner": learner,
        "data": [{"path": str(world / "train.json")}],
        "train": ["adapters"],
        "max_steps": 2,
        "batch_size": 2,
        "logging_steps": 1,
    }
    return {"spec": toy.spec(world / "tokenizer"), "seed": 3, "stages": [stage | changes]}


def test_a_learner_of_a_third_party_trains_a_stage_with_its_own_options(smooth, world, tmp_path):
    evaluate = {"data": [{"path": str(world / "train.json")}], "eval_steps": 2, "max_samples": 2}
    made = recipe(world, {"name": "smooth", "penalty": 1}, evaluate=evaluate)
    report = train(made, out=tmp_path / "run", console=QUIET, device="cpu")
    rows = read_log(tmp_path / "run" / "1-align" / "log.jsonl")
    first, *_ = [row for row in rows if "loss" in row]
    assert first["auxiliary"] == pytest.approx(first["norm"], rel=1e-5)
    metrics = report.stages[0].metrics
    assert "eval_loss" in metrics and "eval_exact" not in metrics  # it does not generate
    assert report.model is not None and diffa.load(tmp_path / "run" / "model").adapters


@pytest.mark.parametrize(
    ("learner", "fault"),
    [
        ({"name": "smooth", "penalti": 1.0}, "penalti: unknown option, did you mean 'penalty'"),
        ({"name": "smooth", "penalty": "much"}, "penalty: expected float, got 'much'"),
        ({"name": "smooth", "penalty": 2.0}, "penalty: must be from 0 to 1, got 2.0"),
    ],
)
def test_faults_of_a_learners_options_are_reported_with_the_recipe(smooth, world, learner, fault):
    with pytest.raises(SpecError, match=f"stages.0.learner.{fault}"):
        Recipe(recipe(world, learner))


def test_an_unknown_learner_brings_a_suggestion(world):
    with pytest.raises(SpecError, match=r"stages.0.learner: .*'anwsers', did you mean 'answers'"):
        Recipe(recipe(world, "anwsers"))


def test_a_learner_without_transforms_breaks_the_contract(tmp_path, monkeypatch, world):
    code = "class Half:\n    def __call__(self, batch):\n        return None\n"
    for site in site_packages(tmp_path / "site", monkeypatch):
        install(site, "half", {"learner": {"half": "half:Half"}}, {"half": code})
        registry.clear_scan()
        with pytest.raises(SpecError, match="learner Half lacks row_transform, collator"):
            Recipe(recipe(world, "half"))


@pytest.mark.parametrize("name", ["answers", "preferences", "nano-answers", "nano-encoder"])
def test_learners_that_diffa_ships_keep_the_contract(name):
    cls = registry.load_part("learner", name)
    assert issubclass(cls, Learner) and not cls.__abstractmethods__
    assert cls.paired == (name == "preferences") and cls.generates == (name != "nano-encoder")


def test_trainers_import_nothing_of_nano():
    folder = Path(__file__).parents[2] / "diffa" / "trainers"
    assert [path for path in folder.rglob("*.py") if "diffa.nano" in path.read_text()] == []


def test_the_answer_learner_refuses_text_in_place_of_audio(world):
    model = diffa.build(toy.spec(world / "tokenizer"))
    learner = AnswerLearner(model, StageConfig())
    sample = Sample("high", "What ?", audio_text="one two")
    batch = learner.collator()([learner.row_transform(training=True)(sample, 0)])
    with pytest.raises(TrainingError, match="reads audio, not text in its place"):
        learner(batch)


def test_costs_count_answers_draws_and_packed_questions(world):
    spec = toy.spec(world / "tokenizer") | {"objective": {"name": "vrpo", "samples": 3}}
    model = diffa.build(spec, device="meta")
    assert PreferenceLearner.cost(StageConfig(), model) == StageCost(2, 3, reference=True)
    packed = LearnerConfig(options={"question_packing": 0.5})
    assert AnswerLearner.cost(StageConfig(learner=packed), model).packing_share == 0.5


def test_an_answer_learner_measures_what_the_model_does(world):
    torch.manual_seed(0)
    model = diffa.build(toy.spec(world / "tokenizer"))
    learner = AnswerLearner(model, StageConfig()).eval()
    transform = learner.row_transform(training=False)
    tone = torch.from_numpy(toy.tone(400))
    samples = [Sample(word, "What ?", audio=tone, rate=16000) for word in ("high", "low")]
    batch = learner.collator()([transform(sample, i) for i, sample in enumerate(samples)])
    loss = model.loss(
        batch.tokens, batch.answer, batch.seeds, lengths=batch.row_lengths,
        audio_at=batch.audio_at, audio=(batch.audio, batch.audio_lengths),
    )  # fmt: skip
    measured = learner(batch)
    assert torch.equal(measured.sum, loss.sum) and torch.equal(measured.weight, loss.weight)
    assert measured.num_tokens == loss.noised.masked.sum()
    assert 0 <= measured.num_correct <= measured.num_tokens
