"""An utterance as text at the pace of audio: what the language model reads before it ever hears."""

from typing import NamedTuple

import numpy as np

from diffa.data.corpora.fsdd import ACCENTS, DIGIT_WORDS
from diffa.nano.corpus.questions import WEIGHTS, Instruction, answer_to, instruct
from diffa.nano.corpus.recordings import Voice
from diffa.nano.corpus.scenes import Draw, Labels, draw_scene, text_labels
from diffa.nano.corpus.vocabulary import BLANK
from diffa.nano.corpus.voices import LANGUAGES, VARIANTS

SAID = ("transcribe", "count", "place", "sum", "largest")  # answered by the words alone


class Imitation(NamedTuple):
    """Text for the audio, a word or BLANK for every slot, and instructions about it."""

    acoustic: tuple[str, ...]  # empty where only the semantic adapter would speak
    semantic: tuple[str, ...]
    instructions: tuple[Instruction, ...]
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
    word once with single blanks, 1 imitates speech. `acoustic` is the Q-Former's number of slots;
    `per` instructions are drawn about every utterance, a share `rewording` of them in other words.
    """

    def __init__(
        self,
        seed: int,
        *,
        acoustic: int = 16,
        pace: float = 1.0,
        most: int = 8,
        kinds: tuple[str, ...] = tuple(WEIGHTS),
        per: int = 1,
        rewording: float = 0.0,
    ) -> None:
        self.seed, self.acoustic, self.pace, self.most = seed, acoustic, pace, most
        self.kinds, self.per, self.rewording, self.voices = kinds, per, rewording, voices()

    def __getitem__(self, index: int) -> Imitation:
        draw = np.random.default_rng((self.seed, index))
        labels = text_labels(draw_scene(draw, self.voices, self.most))
        said = tuple(kind for kind in self.kinds if kind in SAID)
        # Stage 1 and the semantic-only ablation have no acoustic slots.
        deaf = bool(said) and (draw.random() < 0.25 or said == self.kinds)
        deaf = deaf and any(answer_to(kind, labels) for kind in said)
        kinds = said if deaf else self.kinds
        instructions = tuple(
            instruct(labels, draw, kinds, rewording=self.rewording) for _ in range(self.per)
        )
        acoustic = () if deaf else spread(facts(labels), self.acoustic, draw)
        return Imitation(acoustic, self._semantic(labels, draw), instructions, labels)

    def _semantic(self, labels: Labels, draw: Draw) -> tuple[str, ...]:
        """The words at the pace of speech; with no words, blanks for up to three seconds."""
        slots = [BLANK] * self._pause(draw)
        for digit in labels.digits:
            # An adapter taught by CTC writes most words into a single slot.
            heard = 1 + int(draw.random() < 0.1 * self.pace)
            length = heard + int(draw.integers(0, 6) * self.pace)
            before = int(draw.integers(0, length - heard + 1))
            slots += [BLANK] * before + [DIGIT_WORDS[digit]] * heard
            slots += [BLANK] * (length - heard - before + self._pause(draw))
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
        words += [labels.melody.direction, DIGIT_WORDS[labels.melody.notes], "notes"]
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
