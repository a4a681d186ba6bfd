"""Instructions about an utterance: transcription, caption, open questions and multiple choice."""

from typing import Literal, NamedTuple

import numpy as np

from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.data.samples import DataError
from diffa.nano.corpus.phrases import CHOICE_PROMPTS, ORDINALS, paraphrase, phrases
from diffa.nano.corpus.scenes import Labels
from diffa.nano.corpus.sounds import DIRECTIONS, SOUNDS
from diffa.nano.corpus.voices import LANGUAGES

Rng = np.random.Generator
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
MAX_SUMMANDS = 3  # sums are asked of two or three digits

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
TASK_WEIGHTS = {
    "transcribe": 3.0, "caption": 3.0, "count": 1.0, "place": 1.5, "sum": 1.5, "largest": 1.0,
    "same": 1.0, "accent": 1.5, "gender": 1.0, "speed": 1.2, "loudness": 1.0, "sound": 1.0,
    "melody": 2.0, "notes": 2.0,
}  # fmt: skip


class Instruction(NamedTuple):
    """A question about an utterance and its answer; `choices` is empty for an open one."""

    task: str
    question: str
    answer: str
    choices: tuple[str, ...]
    form: Literal["open", "choice"]


def number_to_words(number: int) -> str:
    """Return a number below 100 in words."""
    if number < 20:
        return (*DIGIT_WORDS, *TEENS)[number]
    tens = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")[
        number // 10 - 2
    ]
    return f"{tens} {DIGIT_WORDS[number % 10]}" if number % 10 else tens


def transcript(labels: Labels, silence: str = "nothing") -> str:
    """Return the digits in words, or ``silence`` where nobody speaks."""
    return " ".join(DIGIT_WORDS[digit] for digit in labels.digits) or silence


def true_answer(task: str, labels: Labels, place: int = 0) -> str | None:
    """Return the true answer to an open question, or None if it is not audible."""
    digits = labels.digits
    if task in ("melody", "notes"):
        melody = labels.melody
        return (
            None
            if melody is None
            else melody.direction
            if task == "melody"
            else DIGIT_WORDS[melody.notes]
        )
    match task:
        case "transcribe":
            return transcript(labels)
        case "caption":
            return write_caption(labels)
        case "count":
            return DIGIT_WORDS[len(digits)]
        case "place":
            return DIGIT_WORDS[digits[place]] if place < len(digits) else None
        case "sum":
            return number_to_words(sum(digits)) if 2 <= len(digits) <= MAX_SUMMANDS else None
        case "largest":
            return DIGIT_WORDS[max(digits)] if len(digits) > 1 else None
    return _voice_answer(task, labels)


def _voice_answer(task: str, labels: Labels) -> str | None:
    """Answer a question about how an utterance sounds."""
    speech, silent = bool(labels.digits), labels.sound == "silence"
    match task:
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
    raise ValueError(f"no instruction is called {task!r}")


def write_caption(labels: Labels) -> str | None:
    """Return a sentence of at most 23 words; None if a part of it is not audible."""
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


def nano_seed_transcript(labels: Labels) -> str:
    """Return the bracketed transcript and attributes that answers are written from (DIFFA, 3.2)."""
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


def make_instruction(
    task: str,
    labels: Labels,
    rng: Rng,
    choice: bool = False,
    held_out: bool = False,
    paraphrase_share: float = 0.0,
) -> Instruction | None:
    """Return an instruction of a task in a random phrase; None if the utterance does not allow it.

    ``rewording`` is the share of phrases that are changed a little (``phrases.reworded``).
    """
    place = int(rng.integers(max(len(labels.digits), 1)))
    answer = true_answer(task, labels, place)
    if answer is None:
        return None
    stems = phrases(task, held_out)
    question = stems[int(rng.integers(len(stems)))]
    if paraphrase_share and rng.random() < paraphrase_share:
        question = paraphrase(question, task, rng)
    question = question.format(nth=ORDINALS[place])
    if not choice:
        return Instruction(task, question, answer, (), "open")
    choices = draw_choices(task, answer, rng)
    letter = LETTERS[choices.index(answer)]
    listed = " ".join(f"{name}. {text}" for name, text in zip(LETTERS, choices, strict=True))
    lead = CHOICE_PROMPTS[int(rng.integers(len(CHOICE_PROMPTS)))]
    return Instruction(task, f"{question}{lead} {listed}", f"{letter}. {answer}", choices, "choice")


def draw_choices(task: str, answer: str, rng: Rng) -> tuple[str, ...]:
    """Return four choices in random order, the answer among them."""
    others = (
        [number_to_words(number) for number in range(28)] if task == "sum" else list(CHOICES[task])
    )
    others.remove(answer)
    four = [answer, *rng.choice(others, 3, replace=False)]
    return tuple(str(four[i]) for i in rng.permutation(4))


def draw_instruction(
    labels: Labels,
    rng: Rng,
    tasks: tuple[str, ...] = tuple(TASK_WEIGHTS),
    held_out: bool = False,
    paraphrase_share: float = 0.0,
) -> Instruction:
    """Return a random instruction that the utterance allows, with choices in 2 of 5 cases.

    Raises:
        DataError: it allows none of the kinds.
    """
    open_to = [task for task in tasks if true_answer(task, labels)]
    if not open_to:
        raise DataError(f"none of {', '.join(tasks)} can be asked about this utterance")
    weights = np.array([TASK_WEIGHTS[task] for task in open_to])
    task = open_to[int(rng.choice(len(open_to), p=weights / weights.sum()))]
    choice = task not in ("transcribe", "caption") and rng.random() < 0.4
    instruction = make_instruction(task, labels, rng, choice, held_out, paraphrase_share)
    assert instruction is not None
    return instruction
