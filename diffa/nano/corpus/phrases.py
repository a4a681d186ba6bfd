"""Phrases of the instructions, for training and held out from it, and paraphrases."""

import json
import re
from pathlib import Path

import numpy as np

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

# The last three phrases of every kind are held out: never seen in training, used to try the model.
NUM_HELD_OUT = 3

PHRASES: dict[str, tuple[str, ...]] = {
    task: tuple(texts)
    for task, texts in json.loads(
        (Path(__file__).parent / "phrases.json").read_text(encoding="utf-8")
    ).items()
}
CHOICE_PROMPTS = ("", " Choose one.", " Choose the right letter.", " Pick one:", " Options:")


def phrases(task: str, held_out: bool = False) -> tuple[str, ...]:
    """Return the phrases of one task for training, or those held out from it."""
    return PHRASES[task][-NUM_HELD_OUT:] if held_out else PHRASES[task][:-NUM_HELD_OUT]


# Suffixes that do not change a question.
SUFFIXES = (
    " in the audio", " in the recording", " in this audio", " in this recording", " of the audio",
    " of the recording", " you hear", " that you hear",
)  # fmt: skip
_SUFFIX = re.compile(f"({'|'.join(sorted(SUFFIXES, key=len, reverse=True))})+$")
_DROP_SHARE = 0.15  # of the words


def paraphrase(phrase: str, task: str, rng: np.random.Generator) -> str:
    """Return a training phrase with another suffix, "Please" added or removed, or words dropped.

    With fixed phrases a small language model keys on single words. No held-out phrase is returned.
    """
    stem, mark = phrase[:-1], phrase[-1]
    stem = _SUFFIX.sub("", stem) or stem
    if rng.random() < 0.6:
        stem += SUFFIXES[int(rng.integers(len(SUFFIXES)))]
    if mark == "." and rng.random() < 0.5:
        polite = stem.startswith("Please ")
        stem = stem[7].upper() + stem[8:] if polite else f"Please {stem[0].lower()}{stem[1:]}"
    if rng.random() < 0.3:
        words = stem.split(" ")
        remaining = [word for word in words if "{" in word or rng.random() >= _DROP_SHARE]
        stem = " ".join(remaining if len(remaining) > 1 else words)
    result = stem + mark
    return phrase if result in phrases(task, held_out=True) else result
