"""An utterance as text at the pace of audio: what the language model reads before it ever hears."""

from typing import NamedTuple

import numpy as np

from diffa.data.nano.questions import Instruction, instruct
from diffa.data.nano.recordings import ACCENTS, Voice
from diffa.data.nano.scenes import Draw, Labels, draw_scene, text_labels
from diffa.data.nano.voices import LANGUAGES, VARIANTS, WORDS
from diffa.data.nano.words import BLANK


class Imitation(NamedTuple):
    """One text-only row: a word or BLANK for every audio slot, and an instruction about it."""

    acoustic: tuple[str, ...]  # empty where only the semantic adapter would speak
    semantic: tuple[str, ...]
    instruction: Instruction
    labels: Labels


def voices() -> list[Voice]:
    """Every kind of voice there is, by name only: no recordings are needed."""
    made = [
        Voice(f"{accent} {gender}", gender, accent, False)
        for accent in LANGUAGES
        for gender in VARIANTS
    ]
    return [Voice(name, "man", accent, True) for name, accent in ACCENTS.items()] + made


class Imitations:
    """Row `index` is a pure function of (seed, index).

    Words are repeated over several slots with blanks between them, as an adapter that emits 12.5
    embeddings per second would place them. `pace` in [0, 1] lengthens the blanks: 0 writes every
    word once with single blanks, 1 imitates speech. `acoustic` is the Q-Former's number of slots.
    """

    def __init__(self, seed: int, acoustic: int = 16, pace: float = 1.0, most: int = 8) -> None:
        self.seed, self.acoustic, self.pace, self.most = seed, acoustic, pace, most
        self.voices = voices()

    def __getitem__(self, index: int) -> Imitation:
        draw = np.random.default_rng((self.seed, index))
        labels = text_labels(draw_scene(draw, self.voices, self.most))
        deaf = draw.random() < 0.25  # stage 1 and the semantic-only ablation have no acoustic slots
        kinds = ("transcribe", "count", "place", "sum", "largest") if deaf else None
        instruction = instruct(labels, draw, kinds) if kinds else instruct(labels, draw)
        acoustic = () if deaf else spread(facts(labels), self.acoustic, draw)
        return Imitation(acoustic, self._semantic(labels, draw), instruction, labels)

    def _semantic(self, labels: Labels, draw: Draw) -> tuple[str, ...]:
        """The words at the pace of speech; with no words, blanks for up to three seconds."""
        slots = [BLANK] * self._pause(draw)
        for digit in labels.digits:
            length = 1 + int(draw.integers(0, 6) * self.pace)
            heard = 1 + int(draw.integers(0, length))
            before = int(draw.integers(0, length - heard + 1))
            slots += (
                [BLANK] * before + [WORDS[digit]] * heard + [BLANK] * (length - heard - before + 1)
            )
            slots += [BLANK] * (self._pause(draw) - 1)
        if not labels.digits:
            slots += [BLANK] * int(draw.integers(10, 40))
        return tuple(slots)

    def _pause(self, draw: Draw) -> int:
        return 1 + int(draw.integers(0, 7) * self.pace)


def facts(labels: Labels) -> list[str]:
    """What the acoustic adapter should be able to say, in words, in a fixed order."""
    words: list[str] = []
    people = dict.fromkeys(zip(labels.speakers, labels.accents, labels.genders, strict=True))
    for _, accent, gender in people:
        words += [accent, gender] if accent else [gender]
    sound = labels.sound or "nothing"
    words += [word for word in (labels.loudness, labels.speed, sound) if word]
    if labels.melody:
        words += [labels.melody.direction, WORDS[labels.melody.notes], "notes"]
    return words


def spread(words: list[str], slots: int, draw: Draw) -> tuple[str, ...]:
    """The words in order over `slots` places, some of them repeated, blanks elsewhere."""
    out = [BLANK] * slots
    places = np.sort(draw.choice(slots, len(words), replace=False)).tolist()
    for i, word in enumerate(words):
        end = places[i + 1] if i + 1 < len(words) else slots
        for slot in range(places[i], min(end, places[i] + int(draw.integers(1, 4)))):
            out[slot] = word
    return tuple(out)
