"""Instructions about an utterance: transcription, caption, open questions and multiple choice."""

from typing import Literal, NamedTuple

import numpy as np

from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.data.samples import DataError
from diffa.nano.corpus.phrases import LEADS, ORDINALS, phrases, reworded
from diffa.nano.corpus.scenes import Labels
from diffa.nano.corpus.sounds import DIRECTIONS, SOUNDS
from diffa.nano.corpus.voices import LANGUAGES

Draw = np.random.Generator
TEENS = (
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
LETTERS = "ABCD"
MOST_SUMMED = 3  # sums are asked of two or three digits

# What can be chosen between; the answer is always among four of them.
CHOICES: dict[str, tuple[str, ...]] = {
    "count": DIGIT_WORDS[:9],
    "place": DIGIT_WORDS,
    "largest": DIGIT_WORDS,
    "same": ("same", "different", "nobody", "music"),
    "accent": (*LANGUAGES, "french", "german", "greek"),
    "gender": ("man", "woman", "both", "nobody"),
    "speed": ("slow", "medium", "fast", "none"),
    "loudness": ("quiet", "normal", "loud", "silent"),
    "sound": (*SOUNDS, "melody", "nothing"),
    "melody": DIRECTIONS,
    "notes": DIGIT_WORDS[3:7],
}
# How often a kind is asked where several can be.
WEIGHTS = {
    "transcribe": 3.0, "caption": 3.0, "count": 1.0, "place": 1.5, "sum": 1.5, "largest": 1.0,
    "same": 1.0, "accent": 1.5, "gender": 1.0, "speed": 1.2, "loudness": 1.0, "sound": 1.0,
    "melody": 2.0, "notes": 2.0,
}  # fmt: skip


class Instruction(NamedTuple):
    """A question about an utterance and its answer; `choices` is empty for an open one."""

    kind: str
    question: str
    answer: str
    choices: tuple[str, ...]
    form: Literal["open", "choice"]


def spell(number: int) -> str:
    """A number below 100 in words."""
    if number < 20:
        return (*DIGIT_WORDS, *TEENS)[number]
    tens = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")[
        number // 10 - 2
    ]
    return f"{tens} {DIGIT_WORDS[number % 10]}" if number % 10 else tens


def transcript(labels: Labels) -> str:
    """The digits in words; "nothing" where nobody speaks."""
    return " ".join(DIGIT_WORDS[digit] for digit in labels.digits) or "nothing"


def answer_to(kind: str, labels: Labels, place: int = 0) -> str | None:
    """The true answer to an open question, or None where it cannot be told by ear."""
    digits = labels.digits
    if kind in ("melody", "notes"):
        melody = labels.melody
        return (
            None
            if melody is None
            else melody.direction
            if kind == "melody"
            else DIGIT_WORDS[melody.notes]
        )
    match kind:
        case "transcribe":
            return transcript(labels)
        case "caption":
            return caption(labels)
        case "count":
            return DIGIT_WORDS[len(digits)]
        case "place":
            return DIGIT_WORDS[digits[place]] if place < len(digits) else None
        case "sum":
            return spell(sum(digits)) if 2 <= len(digits) <= MOST_SUMMED else None
        case "largest":
            return DIGIT_WORDS[max(digits)] if len(digits) > 1 else None
    return _voice_answer(kind, labels)


def _voice_answer(kind: str, labels: Labels) -> str | None:
    """Answers about how it sounds, not about what is said."""
    speech, silent = bool(labels.digits), labels.sound == "silence"
    match kind:
        case "same":
            alone = "music" if labels.melody else "nobody"
            return ("same" if labels.voices == 1 else "different") if speech else alone
        case "accent":
            return labels.accents[0] if len(set(labels.accents)) == 1 else None
        case "gender":
            return (
                ("both" if len(set(labels.genders)) > 1 else labels.genders[0])
                if speech
                else "nobody"
            )
        case "speed":
            return labels.speed if speech else "none"
        case "loudness":
            return "silent" if silent else labels.loudness
        case "sound":
            return labels.sound or "nothing"
    raise ValueError(f"no instruction is called {kind!r}")


def caption(labels: Labels) -> str | None:
    """One sentence of at most 23 words; None where a part of it cannot be told by ear."""
    if labels.melody:
        return f"A {labels.melody.direction} melody of {DIGIT_WORDS[labels.melody.notes]} notes."
    if not labels.digits:
        return {"noise": "Only noise.", "clicks": "Only clicks.", "silence": "Only silence."}.get(
            str(labels.sound), f"Only a {labels.sound}."
        )
    if (
        None in labels.accents
        or not labels.loudness
        or (labels.speed is None and len(labels.digits) > 1)
    ):
        return None
    people = list(dict.fromkeys(zip(labels.speakers, labels.accents, labels.genders, strict=True)))
    who = " and ".join(f"a {accent} {gender}" for _, accent, gender in people)
    manner = f"{labels.loudness}, {labels.speed}" if labels.speed else f"{labels.loudness}"
    behind = {None: "", "noise": " over noise", "clicks": " over clicks"}.get(
        labels.sound, f" over a {labels.sound}"
    )
    verb = "says" if len(people) == 1 else "say"
    return f"{manner.capitalize()} speech: {who} {verb} {transcript(labels)}{behind}."


def seed_line(labels: Labels) -> str:
    """The bracketed transcript and attributes from which answers are written (DIFFA, 3.2)."""
    lines = []
    for start, stop, digit, accent, gender in zip(
        *zip(*labels.spans, strict=True), labels.digits, labels.accents, labels.genders, strict=True
    ) if labels.digits else ():  # fmt: skip
        accent = accent or "unclear"
        lines.append(f"[{start:.2f}-{stop:.2f}] ({gender}, {accent} accent) {DIGIT_WORDS[digit]}")
    facts = [f"speed: {labels.speed}", f"volume: {labels.loudness}", f"sound: {labels.sound}"]
    if labels.melody:
        facts.append(f"melody: {labels.melody.direction}, {labels.melody.notes} notes")
    return " ".join(lines) + f" ({'; '.join(fact for fact in facts if not fact.endswith('None'))})"


def ask(
    kind: str,
    labels: Labels,
    draw: Draw,
    choice: bool = False,
    held_out: bool = False,
    rewording: float = 0.0,
) -> Instruction | None:
    """One instruction of a kind, in random words; None where the utterance does not allow it.

    ``rewording`` is the share of phrases that are changed a little (``phrases.reworded``).
    """
    place = int(draw.integers(max(len(labels.digits), 1)))
    answer = answer_to(kind, labels, place)
    if answer is None:
        return None
    stems = phrases(kind, held_out)
    question = stems[int(draw.integers(len(stems)))]
    if rewording and draw.random() < rewording:
        question = reworded(question, kind, draw)
    question = question.format(nth=ORDINALS[place])
    if not choice:
        return Instruction(kind, question, answer, (), "open")
    choices = options(kind, answer, draw)
    letter = LETTERS[choices.index(answer)]
    listed = " ".join(f"{name}. {text}" for name, text in zip(LETTERS, choices, strict=True))
    lead = LEADS[int(draw.integers(len(LEADS)))]
    return Instruction(kind, f"{question}{lead} {listed}", f"{letter}. {answer}", choices, "choice")


def options(kind: str, answer: str, draw: Draw) -> tuple[str, ...]:
    """Four choices in random order, the answer among them."""
    others = [spell(number) for number in range(28)] if kind == "sum" else list(CHOICES[kind])
    others.remove(answer)
    four = [answer, *draw.choice(others, 3, replace=False)]
    return tuple(str(four[i]) for i in draw.permutation(4))


def instruct(
    labels: Labels,
    draw: Draw,
    kinds: tuple[str, ...] = tuple(WEIGHTS),
    held_out: bool = False,
    rewording: float = 0.0,
) -> Instruction:
    """A random instruction that the utterance allows, in 2 of 5 cases with choices.

    Raises:
        DataError: it allows none of the kinds.
    """
    open_to = [kind for kind in kinds if answer_to(kind, labels)]
    if not open_to:
        raise DataError(f"none of {', '.join(kinds)} can be asked about this utterance")
    weights = np.array([WEIGHTS[kind] for kind in open_to])
    kind = open_to[int(draw.choice(len(open_to), p=weights / weights.sum()))]
    choice = kind not in ("transcribe", "caption") and draw.random() < 0.4
    made = ask(kind, labels, draw, choice, held_out, rewording)
    assert made is not None
    return made
