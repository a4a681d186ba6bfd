"""The recipe of nano in minutes: every stage learns, and stage 1 needs its own audio."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffa
from diffa.nano.sources import Nano
from diffa.trainers import train
from diffa.trainers.evaluate import compare

pytestmark = [pytest.mark.slow, pytest.mark.fsdd]
PACK = Path(__file__).parents[2] / "benchmarks" / "pack_nano.py"
SMALL = [
    "spec.encoder.width=96",
    "stages.0.max_steps=60",
    "stages.0.data.0.options.max_digits=2",
    "stages.0.data.0.options.curriculum=[]",
    "stages.1.max_steps=90",
    "stages.1.data.0.options.curriculum=[]",
    "stages.1.data.0.options.max_digits=3",
    "stages.1.data.0.options.tasks=[transcribe]",
    "stages.2.max_steps=30",
    "stages.2.data=[{source: nano-text, options: {seed: 3, max_digits: 3, tasks: [transcribe]}}]",
    "stages.3.max_steps=8",
    "stages.4.max_steps=4",
    "stages.5.max_steps=4",
    "stages.3.data.0.options.cached_utterances=64",
    "stages.3.data.0.options.count=1536",
    "stages.4.data.0.options.cached_utterances=64",
    "stages.4.data.0.options.count=1536",
    "stages.5.data.0.options.cached_utterances=64",
    "stages.5.data.0.options.count=1536",
]


def losses(folder: Path, stage: int, name: str = "loss") -> list[float]:
    (log,) = folder.glob(f"{stage}-*/log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_the_whole_recipe_runs_and_its_stages_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("nano", out=tmp_path / "nano", overrides=SMALL)
    listen, language = losses(tmp_path / "nano", 1), losses(tmp_path / "nano", 2)
    assert listen[-1] < 0.7 * listen[0]
    assert language[-1] < 2.5 < language[0]  # 6.5 nats would be a guess among 677 words
    assert losses(tmp_path / "nano", 3)[-1] < 2.5  # in whole rows too
    model = diffa.load(tmp_path / "nano" / "model")
    answer = model.answer(torch.zeros(16_000), "What can you hear?", max_tokens=8)
    assert answer.tokens.shape == (8,)

    monkeypatch.chdir(tmp_path)  # as the header of nano-captions says
    subprocess.run([sys.executable, str(PACK), "nano/model", "packed"], check=True)
    train("nano-captions", out="captions", overrides=["stages.0.max_steps=2"])
    again = diffa.load("captions/model")
    assert not torch.equal(again.backbone.head.weight, model.backbone.head.weight)
    for ours, theirs in zip(again.adapters.parameters(), model.adapters.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)  # packed in float16


def test_the_adapters_stages_learn_and_stage_1_beats_shuffled_audio(tmp_path: Path) -> None:
    overrides = [
        "stages.0.max_steps=100",
        "stages.0.data.0.options.count=3072",
        "stages.0.data.0.options.cached_utterances=128",
        "stages.1.max_steps=60",
        "stages.1.data.0.options.count=3072",
        "stages.1.data.0.options.cached_utterances=128",
        "stages.2.max_steps=30",
        "stages.2.data.0.options.count=3072",
        "stages.2.data.0.options.cached_utterances=128",
    ]
    train("nano-adapters", out=tmp_path / "run", overrides=overrides)
    transcribe, align, instruct = (losses(tmp_path / "run", stage) for stage in (1, 2, 3))
    assert transcribe[-1] < 0.6 * transcribe[0]
    words = losses(tmp_path / "run", 2, "auxiliary")  # what the acoustic adapter learns them by
    assert words[-1] < 0.6 * words[0]
    assert instruct[-1] < 0.35 < max(align) < 1.0 < transcribe[0]
    trained = diffa.load(tmp_path / "run" / "model")
    model = diffa.swap(trained, adapters={"semantic": trained.spec.data["adapters"]["semantic"]})
    model.adapters["semantic"].load_state_dict(trained.adapters["semantic"].state_dict())
    asked = [Nano(split="test", seed=99, count=48, tasks=["transcribe"])[i] for i in range(48)]
    asked = [sample for sample in asked if sample.target not in ("", "nothing")]
    waves = [sample.audio for sample in asked]

    def error(heard: list[torch.Tensor]) -> float:
        questions = [sample.question for sample in asked]
        written = model.answer(heard, questions, max_tokens=12).text
        return compare(written, [sample.target for sample in asked])["error"]

    assert error(waves) < error(waves[7:] + waves[:7]) - 0.1
