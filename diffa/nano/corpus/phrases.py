"""How the instructions of the nano corpus are put, in training and in held-out words."""

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
    """The phrases of one kind for training, or those held out from it."""
    return PHRASES[task][-NUM_HELD_OUT:] if held_out else PHRASES[task][:-NUM_HELD_OUT]


# What may follow a question without changing it, and what of it training phrases have already.
SUFFIXES = (
    " in the audio", " in the recording", " in this audio", " in this recording", " of the audio",
    " of the recording", " you hear", " that you hear",
)  # fmt: skip
_SUFFIX = re.compile(f"({'|'.join(sorted(SUFFIXES, key=len, reverse=True))})+$")
_DROP_SHARE = 0.15  # of the words


def paraphrase(phrase: str, task: str, rng: np.random.Generator) -> str:
    """A training phrase with another tail, with "Please" or without, and now and then a word less.

    Of thirty fixed phrases a small language model learns by heart which word goes with which
    task; of these it has to read more than one word. No held-out phrase comes out.
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
