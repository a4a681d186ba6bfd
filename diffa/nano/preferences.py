"""Preference pairs about the nano corpus, made from its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from diffa.audio import write_wav
from diffa.data.corpora.fsdd import ACCENTS, DIGIT_WORDS
from diffa.data.formats import write_rows
from diffa.data.synthesis.preferences import Corruption, preference_row
from diffa.nano.corpus.examples import Example, Examples, example_row
from diffa.nano.corpus.files import corpus_folder
from diffa.nano.corpus.questions import CHOICES, number_to_words, write_caption
from diffa.nano.corpus.recordings import Split
from diffa.nano.corpus.scenes import BACKGROUNDS, LEVELS, SPEEDS, Labels, Rng
from diffa.nano.corpus.shaping import RATE
from diffa.nano.corpus.sounds import DIRECTIONS, NOTES, SOUNDS, Direction
from diffa.nano.corpus.utterances import Utterances
from diffa.nano.corpus.voices import LANGUAGES
from diffa.runtime.files import expand

SOURCE = "labels_nano_v1"
ACCENT_NAMES = tuple(sorted({*LANGUAGES, *ACCENTS.values()}))


class Pair(NamedTuple):
    """An example whose answer is to be chosen, and what is wrong with the rejected one."""

    example: Example
    corruption: Corruption


def draw_other(value: str, values: tuple[str, ...], rng: Rng) -> str:
    """Draw one of the other values."""
    left = [v for v in values if v != value]
    return left[int(rng.integers(len(left)))]


def corrupt_example(example: Example, seed: int = 0) -> Corruption | None:
    """Get one audible attribute of an example's answer wrong; None where there is none to.

    A choice's letter is exchanged together with its text. The draw follows from the seed, the id
    and the question.
    """
    key = (seed, *f"{example.audio_id} {example.question}".encode())
    rng = np.random.default_rng(key)
    if example.task == "transcribe":
        return _digit(example.labels, rng)
    if example.task == "caption":
        return _caption(example.labels, rng)
    letter, dot, text = example.answer.partition(". ")
    if not dot:
        wrong = draw_other(example.answer, _values(example), rng)
        return Corruption(wrong, example.task, _reason(example.task, wrong, example.answer))
    choices = _choices(example.question)
    wrong = draw_other(letter, tuple(choices), rng)
    reason = _reason(example.task, choices[wrong], text)
    return Corruption(f"{wrong}. {choices[wrong]}", example.task, reason)


def _values(example: Example) -> tuple[str, ...]:
    """Return the possible answers to an open question about recordings of this sort."""
    labels, task = example.labels, example.task
    if task == "sum":
        right = sum(labels.digits)
        return tuple(number_to_words(n) for n in range(max(right - 4, 0), min(right + 5, 28)))
    if task == "accent":
        return ACCENT_NAMES
    if task == "gender" and labels.digits:
        return ("man", "woman")
    if task == "same" and labels.digits:
        return ("same", "different")
    if task in ("speed", "loudness") and labels.digits:
        return tuple(SPEEDS if task == "speed" else LEVELS)
    return tuple(CHOICES[task])


def _choices(question: str) -> dict[str, str]:
    """Letters and texts of ``... A. one B. two C. three D. four``."""
    choices: dict[str, str] = {}
    rest = question
    for letter, after in zip("ABCD", "BCD ", strict=True):
        rest = rest.partition(f" {letter}. ")[2]
        choices[letter] = rest.partition(f" {after}. ")[0].strip()
    return choices


def _reason(attribute: str, wrong: str, right: str) -> str:
    return f"{attribute}: {wrong}, not {right}"


def _digit(labels: Labels, rng: Rng) -> Corruption | None:
    if not labels.digits:
        return None
    words = [DIGIT_WORDS[digit] for digit in labels.digits]
    place = int(rng.integers(len(words)))
    right, words[place] = words[place], draw_other(words[place], DIGIT_WORDS, rng)
    return Corruption(" ".join(words), "text", _reason("text", words[place], right))


def _caption(labels: Labels, rng: Rng) -> Corruption | None:
    """Change one label and write the caption anew: fluent, and wrong in one thing."""
    changes = _caption_changes(labels, rng)
    name, right, values, change = changes[int(rng.integers(len(changes)))]
    wrong = draw_other(right, values, rng)
    text = write_caption(labels._replace(**change(wrong)))
    return None if text is None else Corruption(text, name, _reason(name, wrong, right))


class CaptionChange(NamedTuple):
    """An attribute that a caption names, its value, all its values, and the labels of another."""

    name: str
    right: str
    values: tuple[str, ...]
    change: Callable[[str], dict[str, Any]]


def _caption_changes(labels: Labels, rng: Rng) -> list[CaptionChange]:
    if labels.melody:
        old, notes = labels.melody, tuple(DIGIT_WORDS[n] for n in NOTES)
        return [
            CaptionChange("melody", old.direction, DIRECTIONS,
                lambda new: {"melody": old._replace(direction=cast(Direction, new))}),
            CaptionChange("notes", DIGIT_WORDS[old.notes], notes,
                lambda new: {"melody": old._replace(notes=DIGIT_WORDS.index(new))}),
        ]  # fmt: skip
    if not labels.digits:
        return [
            CaptionChange("sound", str(labels.sound), tuple(SOUNDS), lambda new: {"sound": new})
        ]
    digits, place = labels.digits, int(rng.integers(len(labels.digits)))
    changes = [
        CaptionChange("text", DIGIT_WORDS[digits[place]], DIGIT_WORDS,
            lambda new: {
                "digits": (*digits[:place], DIGIT_WORDS.index(new), *digits[place + 1 :])
            }),
        CaptionChange("accent", str(labels.accents[0]), ACCENT_NAMES,
            lambda new: {"accents": _of_first(labels, labels.accents, new)}),
        CaptionChange("gender", labels.genders[0], ("man", "woman"),
            lambda new: {"genders": _of_first(labels, labels.genders, new)}),
        CaptionChange("loudness", str(labels.loudness), tuple(LEVELS),
            lambda new: {"loudness": new}),
    ]  # fmt: skip
    if labels.speed:
        changes.append(
            CaptionChange("speed", labels.speed, tuple(SPEEDS), lambda new: {"speed": new})
        )
    if labels.sound:
        changes.append(
            CaptionChange("sound", labels.sound, BACKGROUNDS, lambda new: {"sound": new})
        )
    return changes


def _of_first(labels: Labels, values: Sequence[str | None], new: str) -> tuple[str | None, ...]:
    """Change what is said of the first speaker, wherever they speak."""
    both = zip(labels.speakers, values, strict=True)
    return tuple(new if who == labels.speakers[0] else value for who, value in both)


def pairs(examples: Examples, seed: int = 0) -> Iterator[Pair]:
    """Yield the examples that have something to get wrong, each with its corruption."""
    for index in range(len(examples)):
        example = examples[index]
        corruption = corrupt_example(example, seed)
        if corruption is not None:
            yield Pair(example, corruption)


def write_preferences(
    folder: str | Path,
    split: Split,
    seed: int,
    count: int,
    *,
    fsdd: str | Path | None = None,
    exclude_speakers: tuple[str, ...] = (),
    form: Literal["json", "jsonl", "parquet"] = "json",
) -> Path:
    """Write ``count`` pairs: audio/{split}-preferences/*.wav and the manifest, returned.

    Raises:
        AudioError: There are no recordings of digits.
        DataError: The folder holds another corpus, or cannot be written.
    """
    folder, name = expand(folder), f"{split}-preferences"
    utterances = Utterances(split, seed, fsdd, exclude_speakers)
    # examples without a pair (silence has no words to change) are replaced by later ones
    examples = Examples(utterances, count * 2)
    speakers = [voice.name for voice in utterances.voices]
    rows = []
    with corpus_folder(
        folder, f"{name}.{form}", {"seed": seed, "count": count, "speakers": speakers}
    ) as audio:
        for number, pair in enumerate(islice(pairs(examples, seed), count)):
            file = f"{pair.example.audio_id}.wav"
            write_wav(audio / file, pair.example.audio, RATE)
            path = (folder / "audio" / name / file).absolute()
            row = example_row(pair.example, path) | {"split": split}
            row["audio_id"] = f"{pair.example.audio_id}-p{number}"
            rows.append(preference_row(row, pair.corruption, SOURCE))
    return write_rows(folder / f"{name}.{form}", rows)
