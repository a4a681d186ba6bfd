"""How the instructions of the nano corpus are put, in training and in held-out words."""

import json
from pathlib import Path

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

# The last three phrases of every kind are held out: never seen in training, used to try the model.
HELD_OUT = 3

PHRASES: dict[str, tuple[str, ...]] = {
    kind: tuple(texts)
    for kind, texts in json.loads(
        (Path(__file__).parent / "phrases.json").read_text(encoding="utf-8")
    ).items()
}
LEADS = ("", " Choose one.", " Choose the right letter.", " Pick one:", " Options:")


def phrases(kind: str, held_out: bool = False) -> tuple[str, ...]:
    """The phrases of one kind for training, or those held out from it."""
    return PHRASES[kind][-HELD_OUT:] if held_out else PHRASES[kind][:-HELD_OUT]
