"""Every part answers on a stand-in for a GPU what it answers on the CPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small, toy
from serving.test_batching import SAMPLERS
from test_combinations import ADAPTERS, BACKBONES, ENCODERS, spec
from trainers.test_precision import KINDS, recipe

import diffa
from diffa.testing.device import StandInDevice
from diffa.trainers import train
from diffa.trainers.progress import read_log

NAMES = [
    *(("tiny", adapter, "llada") for adapter in ADAPTERS),
    *((encoder, "pool", "llada") for encoder in ENCODERS if encoder not in ("tiny", "whisper")),
    *(("tiny", "linear", backbone) for backbone in BACKBONES),
]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_parts_answer_the_same(names):
    torch.manual_seed(3)  # pretrained families draw their weights
    model = diffa.build(spec(*names), device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    rate = model.encoder.sample_rate
    waves = [0.1 * torch.randn(int(s * rate), generator=generator) for s in (0.5, 0.3)]
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    due = model.generate(prompts, waves, audio_at=[1, 2], max_tokens=4).tokens
    with StandInDevice():
        moved = copy.deepcopy(model).to("cuda:0")
        tokens = moved.generate(prompts, waves, audio_at=[1, 2], max_tokens=4).tokens
    assert [row.tolist() for row in tokens] == [row.tolist() for row in due]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_decode_the_same(name):
    kind, options = SAMPLERS[name]
    asked = small.questions(3)
    model = small.backbone()
    due, _ = small.decode(model, kind(model.vocab, **options), asked)
    with StandInDevice():
        moved = small.backbone().to("cuda:0")
        tokens, _ = small.decode(moved, kind(moved.vocab, **options), asked)
        assert tokens.tolist() == due.tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_world(tmp_path_factory.mktemp("device"), rejected="three four five")


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_log(out / "1-learn" / "log.jsonl") if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_stages_learn_the_same(kind: str, world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**KINDS[kind], "max_steps": 3, "save_steps": 3}
    made = recipe(world, "float32", options)
    train(made, out=tmp_path / "cpu", console=toy.QUIET, device="cpu")
    with StandInDevice():
        train(made, out=tmp_path / "cuda", console=toy.QUIET, device="cuda:0")
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=0.01)


def test_answers_are_scored_the_same(world: Path) -> None:
    model = diffa.build(toy.spec(world / "tokenizer"), device="cpu").eval()
    wave = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(1))
    due = model.score((wave, 16000), "What ?", ["one", "two three"])
    with StandInDevice():
        scores = (
            copy.deepcopy(model).to("cuda:0").score((wave, 16000), "What ?", ["one", "two three"])
        )
    assert scores.values.tolist() == pytest.approx(due.values.tolist(), rel=1e-4)
