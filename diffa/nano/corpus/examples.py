"""The nano corpus as training examples: on the fly, or as files in DIFFA's JSON format."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from diffa.audio import write_wav
from diffa.errors import SpecError
from diffa.nano.corpus.files import corpus_folder
from diffa.nano.corpus.questions import (
    TASK_WEIGHTS,
    Instruction,
    draw_instruction,
    make_instruction,
    nano_seed_transcript,
    transcript,
)
from diffa.nano.corpus.recordings import Split
from diffa.nano.corpus.scenes import Labels
from diffa.nano.corpus.shaping import RATE, Wave
from diffa.nano.corpus.utterances import Utterances
from diffa.runtime.files import expand, write_json, write_text

DATASET = "diffa-nano"


class Example(NamedTuple):
    """One question about one utterance, and further ones with their answers."""

    audio: Wave
    question: str
    answer: str
    labels: Labels
    task: str
    audio_id: str
    extra_questions: tuple[tuple[str, str], ...] = ()


class Examples:
    """Random access to examples; example ``index`` follows from (seed, index) alone.

    Args:
        utterances: What the examples are about.
        count: Number of examples.
        tasks: Kinds of question, keys of ``TASK_WEIGHTS``.
        samples_per_utterance: Consecutive examples about one utterance, whose features are then
            computed once.
        questions_per_sample: Questions of one example.
        held_out_phrases: Ask in phrases that are left out of training.
    """

    def __init__(
        self,
        utterances: Utterances,
        count: int,
        *,
        tasks: tuple[str, ...] = tuple(TASK_WEIGHTS),
        samples_per_utterance: int = 1,
        questions_per_sample: int = 1,
        held_out_phrases: bool = False,
    ) -> None:
        if unknown := sorted(set(tasks) - set(TASK_WEIGHTS)):
            raise SpecError(f"unknown tasks {unknown}; tasks: {', '.join(TASK_WEIGHTS)}")
        if not tasks or samples_per_utterance < 1 or questions_per_sample < 1:
            raise SpecError(
                "at least one task, samples_per_utterance and questions_per_sample of at least 1 "
                f"are needed, got {tasks}, {samples_per_utterance} and {questions_per_sample}"
            )
        self.utterances, self.count, self.tasks = utterances, count, tasks
        self.samples_per_utterance = samples_per_utterance
        self.questions_per_sample = questions_per_sample
        self.held_out_phrases = held_out_phrases

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        number = self.utterance_index(index)
        utterance = self.utterances[number]
        first, *others = self.instructions(index, utterance.labels)
        return Example(
            utterance.audio,
            first.question,
            first.answer,
            utterance.labels,
            first.task,
            f"nano-{self.utterances.seed}-{number}",
            tuple((other.question, other.answer) for other in others),
        )

    def with_max_digits(self, max_digits: int) -> Examples:
        """Return the same examples about utterances with fewer digits."""
        other = copy.copy(self)
        other.utterances = copy.copy(self.utterances)
        other.utterances.max_digits = max_digits
        return other

    def utterance_index(self, index: int) -> int:
        """Return which utterance example ``index`` is about."""
        return index // self.samples_per_utterance

    def instructions(self, index: int, labels: Labels) -> list[Instruction]:
        """Return the questions of example ``index``, whose utterance has these labels."""
        rng = np.random.default_rng((self.utterances.seed, index, 1))
        return [
            draw_instruction(labels, rng, self.tasks, self.held_out_phrases)
            for _ in range(self.questions_per_sample)
        ]


def all_instructions(
    labels: Labels, seed: int, index: int, held_out: bool = False
) -> Iterator[Instruction]:
    """Yield every instruction that an utterance allows, open and as multiple choice."""
    for number, task in enumerate(TASK_WEIGHTS):
        for choice in (False, True)[: 1 if task in ("transcribe", "caption") else 2]:
            rng = np.random.default_rng((seed, index, number, int(choice)))
            instruction = make_instruction(task, labels, rng, choice, held_out)
            if instruction:
                yield instruction


def example_row(example: Example, path: Path | str) -> dict[str, str | float]:
    """Return an example as a row of the published manifest."""
    return {
        "audio_id": example.audio_id,
        "audio_filepath": str(path),
        "transcription": transcript(example.labels),
        "input": example.question,
        "target": example.answer,
        "dataset": DATASET,
        "duration": round(len(example.audio) / RATE, 3),
        "seed_transcript": nano_seed_transcript(example.labels),
    }


def write_corpus(
    folder: str | Path,
    split: Split,
    seed: int,
    count: int,
    *,
    fsdd: str | Path | None = None,
    exclude_speakers: tuple[str, ...] = (),
    synthetic_voices: bool = True,
    questions_per_utterance: int = 1,
    form: Literal["json", "jsonl"] = "jsonl",
) -> Path:
    """Write ``count`` examples: audio/{split}/*.wav and {split}.json or .jsonl, returned.

    Raises:
        AudioError: There are no recordings of digits.
        DataError: The folder holds another corpus, or cannot be written.
    """
    folder = expand(folder)
    utterances = Utterances(split, seed, fsdd, exclude_speakers, synthetic_voices)
    examples = Examples(utterances, count, samples_per_utterance=questions_per_utterance)
    options = {
        "seed": seed, "count": count, "speakers": [voice.name for voice in utterances.voices],
        "questions_per_utterance": questions_per_utterance,
    }  # fmt: skip
    rows = []
    with corpus_folder(folder, f"{split}.{form}", options) as audio:
        for index in range(count):
            example = examples[index]
            file = f"{example.audio_id}.wav"
            number = index % questions_per_utterance
            if number == 0:
                write_wav(audio / file, example.audio, RATE)
            # The published format wants an id for every row, not for every recording.
            row = example_row(example, Path("audio") / split / file)
            rows.append(row | {"audio_id": f"{example.audio_id}-{number}"})
    manifest = folder / f"{split}.{form}"
    if form == "json":
        return write_json(manifest, rows)
    return write_text(manifest, "".join(json.dumps(row) + "\n" for row in rows))
