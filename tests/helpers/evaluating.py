"""A small benchmark of noise for tests of evaluation, and a model that needs no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch

import diffa

COUNT = 16


def row(number: int) -> dict[str, object]:
    return {
        "id": f"item-{number}",
        "task_name": f"task {number % 3}",
        "audio_path": f"audio/{number}.wav",
        "question": "Which digit?" + " please" * (number % 4),
        **{f"choice_{slot}": f"word{slot}" for slot in "abcd"},
        "answer_gt": f"word{'abcd'[number % 4]}",
        "category": "Perception" if number % 2 else "Reasoning",
        "sub-category": "Semantics",
    }


def write_benchmark(folder: Path) -> Path:
    """Recordings of different lengths and the JSONL that asks about them."""
    (folder / "audio").mkdir()
    draw = np.random.default_rng(3)
    for number in range(COUNT):
        wave = draw.standard_normal(int(draw.uniform(0.1, 0.6) * 16_000)) * 0.1
        soundfile.write(folder / "audio" / f"{number}.wav", wave, 16_000)
    file = folder / "items.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(COUNT)))
    return file


class Stub:
    """A model that hears how long a recording is, at once."""

    def __init__(self, model: diffa.Model) -> None:
        self.spec, self.sampler, self.encoder = model.spec, model.sampler, model.encoder
        self.device, self.dtype, self.asked = model.device, model.dtype, 0

    def answer(self, waves, questions, **options) -> diffa.Answer:
        self.asked += len(waves)
        texts = ["ABCD"[len(wave) % 4] for wave in waves]
        return diffa.Answer(texts, [torch.zeros(0)] * len(texts), 1, [0.0] * len(texts))


def records(out: Path) -> bytes:
    return (out / "records.jsonl").read_bytes()


def answers(out: Path) -> list[object]:
    return [json.loads(line)["response"] for line in records(out).splitlines()]
