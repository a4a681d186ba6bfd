"""Make nano-suite: questions in MMSU's shape about recordings that nano never learned from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffa.evaluation.items import EvaluationError
from diffa.nano.corpus.files import corpus_folder
from diffa.nano.corpus.phrases import ORDINALS, phrases
from diffa.nano.corpus.questions import draw_choices, true_answer
from diffa.nano.corpus.recordings import Voice
from diffa.nano.corpus.scenes import LEVELS, SPEEDS, Rng, Scene
from diffa.nano.corpus.shaping import RATE
from diffa.nano.corpus.utterances import Utterance, Utterances
from diffa.runtime.files import expand, write_text

MANIFEST = "nano-suite.jsonl"
_TRIES = 200  # scenes drawn for one item before its task is given up


class SuiteTask(NamedTuple):
    """One kind of question: its categories in MMSU, and the scenes it needs.

    Attributes:
        kind: the kind of ``diffa.nano.corpus.questions``.
        category, area: MMSU's Perception or Reasoning, and its linguistic side.
        digits: how many are said, fewest and most.
        answers: what the true answers go through in turn, where they are few.
    """

    question_task: str
    category: str
    area: str
    digits: tuple[int, int]
    answers: tuple[str, ...] = ()


TASKS = {
    "digit identity": SuiteTask("place", "Perception", "Phonology", (1, 1)),
    "accent": SuiteTask(
        "accent", "Perception", "Paralinguistics", (3, 5), ("american", "french", "german", "greek")
    ),
    "speed": SuiteTask("speed", "Perception", "Paralinguistics", (3, 6), tuple(SPEEDS)),
    "loudness": SuiteTask("loudness", "Perception", "Paralinguistics", (2, 5), tuple(LEVELS)),
    "speaker": SuiteTask("same", "Perception", "Paralinguistics", (2, 5), ("same", "different")),
    "digit order": SuiteTask("place", "Reasoning", "Semantics", (3, 6)),
    "count": SuiteTask("count", "Reasoning", "Semantics", (1, 7)),
    "sum": SuiteTask("sum", "Reasoning", "Semantics", (2, 3)),
    "largest": SuiteTask("largest", "Reasoning", "Semantics", (2, 5)),
}


def write_suite(
    folder: str | Path,
    *,
    fsdd: str | Path | None = None,
    seed: int = 20_261_121,
    per_task: int = 50,
    on_item: Callable[[int], None] | None = None,
) -> Path:
    """Write ``audio/nano-suite/*.wav`` and the JSONL, with MMSU's columns; return the JSONL.

    Digits are those of the official test split (indices 0 to 4) of the Free Spoken Digit Dataset,
    of real people only. An item depends on the seed, its task and its number alone.

    Raises:
        AudioError: The recordings are not there.
        DataError: The folder holds another suite, or cannot be written.
        EvaluationError: A task cannot be made from them.
    """
    import soundfile

    speech = Utterances("test", seed, fsdd, synthetic_voices=False)
    folder = expand(folder)
    rows: list[dict[str, Any]] = []
    speakers = [voice.name for voice in speech.voices]
    options = {"seed": seed, "per_task": per_task, "speakers": speakers}
    with corpus_folder(folder, MANIFEST, options) as audio:
        for place, name in enumerate(TASKS):
            for number in range(per_task):
                rng = np.random.default_rng((seed, place, number))
                utterance, question, answer, choices = make_item(speech, name, number, rng)
                file = f"{name.replace(' ', '-')}-{number:04d}.wav"
                soundfile.write(audio / file, utterance.audio, RATE, subtype="PCM_16")
                path = f"audio/{Path(MANIFEST).stem}/{file}"
                rows.append(suite_row(name, number, path, question, answer, choices))
                if on_item is not None:
                    on_item(len(rows))
    return write_text(folder / MANIFEST, "".join(json.dumps(row) + "\n" for row in rows))


def make_item(
    speech: Utterances, name: str, number: int, rng: Rng
) -> tuple[Utterance, str, str, tuple[str, ...]]:
    """Return an item: sound, question, answer and four choices; raises EvaluationError."""
    task = TASKS[name]
    target = task.answers[number % len(task.answers)] if task.answers else None
    for _ in range(_TRIES):
        scene = _scene(task, target, speech.recordings.voices, rng)
        utterance = speech.render(scene, rng)
        place = int(rng.integers(len(utterance.labels.digits)))
        answer = true_answer(task.question_task, utterance.labels, place)
        whole = len(utterance.labels.digits) == len(scene.digits)
        if whole and answer is not None and target in (None, answer):
            stems = phrases(task.question_task)
            question = stems[int(rng.integers(len(stems)))].format(nth=ORDINALS[place])
            return utterance, question, answer, draw_choices(task.question_task, answer, rng)
    raise EvaluationError(
        f"no {name} item with the answer {target!r} in {_TRIES} tries: are all six speakers there?"
    )


def suite_row(
    name: str, number: int, file: str, question: str, answer: str, choices: Sequence[str]
) -> dict[str, Any]:
    """Return an item in MMSU's columns."""
    task = TASKS[name]
    slots = {f"choice_{slot}": text for slot, text in zip("abcd", choices, strict=True)}
    return {
        "id": f"{name.replace(' ', '-')}-{number:04d}",
        "task_name": name,
        "audio_path": file,
        "question": question,
        **slots,
        "answer_gt": answer,
        "category": task.category,
        "sub-category": task.area,
        "sub-sub-category": name,
        "linguistics_sub_discipline": task.area,
    }


def _scene(task: SuiteTask, target: str | None, voices: list[Voice], rng: Rng) -> Scene:
    """Draw a scene of real speech that may have the wanted answer."""
    count = int(rng.integers(task.digits[0], task.digits[1] + 1))
    digits = tuple(int(digit) for digit in rng.integers(0, 10, count))
    pool = [
        voice for voice in voices if task.question_task != "accent" or voice.accent == target
    ] or voices
    first = pool[int(rng.integers(len(pool)))]
    cast = (first,) * count
    if target == "different":
        others = [voice for voice in voices if voice != first]
        turn = int(rng.integers(1, count))
        cast = (first,) * turn + (others[int(rng.integers(len(others)))],) * (count - turn)
    speed = next((name for name in SPEEDS if name == target), None)
    level = next((name for name in LEVELS if name == target), None)
    speed = speed or tuple(SPEEDS)[int(rng.integers(len(SPEEDS)))]
    level = level or tuple(LEVELS)[int(rng.integers(len(LEVELS)))]
    return Scene(digits, cast, speed, level, None, None)
