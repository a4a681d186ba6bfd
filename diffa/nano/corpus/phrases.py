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
    said, mark = phrase[:-1], phrase[-1]
    said = _SUFFIX.sub("", said) or said
    if rng.random() < 0.6:
        said += SUFFIXES[int(rng.integers(len(SUFFIXES)))]
    if mark == "." and rng.random() < 0.5:
        polite = said.startswith("Please ")
        said = said[7].upper() + said[8:] if polite else f"Please {said[0].lower()}{said[1:]}"
    if rng.random() < 0.3:
        words = said.split(" ")
        kept = [word for word in words if "{" in word or rng.random() >= _DROP_SHARE]
        said = " ".join(kept if len(kept) > 1 else words)
    made = said + mark
    return phrase if made in phrases(task, held_out=True) else made
