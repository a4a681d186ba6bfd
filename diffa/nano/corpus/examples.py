"""The nano corpus as training examples: on the fly, or as files in DIFFA's JSON format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from diffa.errors import SpecError
from diffa.nano.corpus.questions import WEIGHTS, Instruction, ask, instruct, seed_line, transcript
from diffa.nano.corpus.recordings import Split, Wave
from diffa.nano.corpus.scenes import Labels
from diffa.nano.corpus.shaping import RATE
from diffa.nano.corpus.utterances import Utterances
from diffa.runtime.files import write_text

DATASET = "diffa-nano"


class Example(NamedTuple):
    """One question about one utterance: what training reads."""

    wave: Wave
    question: str
    answer: str
    labels: Labels
    kind: str
    audio_id: str
    more: tuple[tuple[str, str], ...] = ()  # further questions with their answers


class Examples:
    """Example `index` of a split: a pure function of (seed, index), in any process and any order.

    `per` examples in a row ask about the same utterance, so that its features are computed once;
    or one example asks several `questions` about it.
    """

    def __init__(
        self,
        utterances: Utterances,
        count: int,
        *,
        kinds: tuple[str, ...] = tuple(WEIGHTS),
        per: int = 1,
        questions: int = 1,
        held_out: bool = False,
    ) -> None:
        unknown = sorted(set(kinds) - set(WEIGHTS))
        if unknown or not kinds or per < 1 or questions < 1:
            raise SpecError(
                f"unknown kinds {unknown} or none, or per {per} or questions {questions} below 1; "
                f"kinds: {', '.join(WEIGHTS)}"
            )
        self.utterances, self.count, self.per = utterances, count, per
        self.kinds, self.held_out, self.questions = kinds, held_out, questions

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        clip = self.clip(index)
        utterance = self.utterances[clip]
        made, *others = self.instructions(index, utterance.labels)
        name = f"nano-{self.utterances.seed}-{clip}"
        more = tuple((one.question, one.answer) for one in others)
        return Example(
            utterance.wave, made.question, made.answer, utterance.labels, made.kind, name, more
        )

    def clip(self, index: int) -> int:
        """Which utterance example `index` is about."""
        return index // self.per

    def instructions(self, index: int, labels: Labels) -> list[Instruction]:
        """The questions of example `index`, once the labels of its utterance are known."""
        draw = np.random.default_rng((self.utterances.seed, index, 1))
        return [instruct(labels, draw, self.kinds, self.held_out) for _ in range(self.questions)]


def questions_for_trial(
    labels: Labels, seed: int, index: int, held_out: bool = False
) -> Iterator[Instruction]:
    """Every instruction an utterance allows, open and as multiple choice: for evaluation."""
    for number, kind in enumerate(WEIGHTS):
        for choice in (False, True)[: 1 if kind in ("transcribe", "caption") else 2]:
            draw = np.random.default_rng((seed, index, number, int(choice)))
            made = ask(kind, labels, draw, choice, held_out)
            if made:
                yield made


def row_of(example: Example, path: Path | str) -> dict[str, str | float]:
    """One row of the published dataset format."""
    return {
        "audio_id": example.audio_id,
        "audio_filepath": str(path),
        "transcription": transcript(example.labels),
        "input": example.question,
        "target": example.answer,
        "dataset": DATASET,
        "duration": round(len(example.wave) / RATE, 3),
        "seed_transcript": seed_line(example.labels),
    }


def write_corpus(
    folder: str | Path,
    split: Split,
    seed: int,
    count: int,
    *,
    fsdd: str | Path | None = None,
    leave_out: tuple[str, ...] = (),
    synthetic: bool = True,
    per: int = 1,
    form: Literal["json", "jsonl"] = "jsonl",
) -> Path:
    """Write `count` examples: audio/*.wav and the manifest {split}.json or .jsonl, returned."""
    import soundfile

    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    examples = Examples(Utterances(split, seed, fsdd, leave_out, synthetic), count, per=per)
    rows = []
    for index in range(count):
        example = examples[index]
        path = Path("audio") / f"{split}-{example.audio_id}.wav"
        if index % per == 0:
            soundfile.write(folder / path, example.wave, RATE, subtype="FLOAT")
        row = row_of(example, path)
        rows.append(
            row | {"audio_id": f"{example.audio_id}-{index % per}"}
        )  # ids are unique per row
    manifest = folder / f"{split}.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return write_text(manifest, lines if form == "jsonl" else json.dumps(rows, indent=1))
