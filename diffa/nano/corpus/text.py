"""Utterances as text at the pace of audio, for training a language model without audio."""

from typing import NamedTuple

import numpy as np

from diffa.data.corpora.fsdd import ACCENTS, DIGIT_WORDS
from diffa.nano.corpus.questions import TASK_WEIGHTS, Instruction, draw_instruction, true_answer
from diffa.nano.corpus.recordings import Voice
from diffa.nano.corpus.scenes import Labels, Rng, draw_scene, scene_labels
from diffa.nano.corpus.vocabulary import BLANK
from diffa.nano.corpus.voices import LANGUAGES, VARIANTS

TRANSCRIPT_TASKS = ("transcribe", "count", "place", "sum", "largest")  # answered by the words alone


class AudioText(NamedTuple):
    """Text for the audio, a word or BLANK for every slot, and instructions about it."""

    acoustic: tuple[str, ...]  # empty where only the semantic adapter would speak
    semantic: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: Labels


def named_voices() -> list[Voice]:
    """Return every kind of voice by name; no recordings are needed."""
    synthetic = [
        Voice(f"{accent} {gender}", gender, accent, False)
        for accent in LANGUAGES
        for gender in VARIANTS
    ]
    return [Voice(name, "man", accent, True) for name, accent in ACCENTS.items()] + synthetic


class AudioTexts:
    """Random access to audio texts; text ``index`` follows from (seed, index) alone.

    Words are repeated over several slots with blanks between them, as an adapter that emits 12.5
    embeddings per second would place them.

    Args:
        seed: Random seed.
        acoustic_slots: Number of the acoustic adapter's embeddings.
        pace: Length of the blanks from 0 (every word once, single blanks) to 1 (that of speech).
        max_digits: Largest number of digits in an utterance.
        tasks: Kinds of question.
        questions_per_sample: Instructions about each utterance.
        paraphrase_share: Share of the instructions that are paraphrased.
    """

    def __init__(
        self,
        seed: int,
        *,
        acoustic_slots: int = 16,
        pace: float = 1.0,
        max_digits: int = 8,
        tasks: tuple[str, ...] = tuple(TASK_WEIGHTS),
        questions_per_sample: int = 1,
        paraphrase_share: float = 0.0,
    ) -> None:
        self.seed, self.acoustic_slots, self.pace, self.max_digits = (
            seed,
            acoustic_slots,
            pace,
            max_digits,
        )
        self.tasks, self.questions_per_sample, self.paraphrase_share, self.named_voices = (
            tasks,
            questions_per_sample,
            paraphrase_share,
            named_voices(),
        )

    def __getitem__(self, index: int) -> AudioText:
        rng = np.random.default_rng((self.seed, index))
        labels = scene_labels(draw_scene(rng, self.named_voices, self.max_digits))
        transcript_tasks = tuple(task for task in self.tasks if task in TRANSCRIPT_TASKS)
        # Stage 1 and the semantic-only ablation have no acoustic slots.
        without_acoustics = bool(transcript_tasks) and (
            rng.random() < 0.25 or transcript_tasks == self.tasks
        )
        without_acoustics = without_acoustics and any(
            true_answer(task, labels) for task in transcript_tasks
        )
        tasks = transcript_tasks if without_acoustics else self.tasks
        instructions = tuple(
            draw_instruction(labels, rng, tasks, paraphrase_share=self.paraphrase_share)
            for _ in range(self.questions_per_sample)
        )
        acoustic = (
            ()
            if without_acoustics
            else spread_words(acoustic_words(labels), self.acoustic_slots, rng)
        )
        return AudioText(acoustic, self._semantic(labels, rng), instructions, labels)

    def _semantic(self, labels: Labels, rng: Rng) -> tuple[str, ...]:
        """Return the words at the pace of speech, or blanks for up to three seconds."""
        slots = [BLANK] * self._draw_pause(rng)
        for digit in labels.digits:
            # An adapter taught by CTC writes most words into a single slot.
            repeats = 1 + int(rng.random() < 0.1 * self.pace)
            length = repeats + int(rng.integers(0, 6) * self.pace)
            before = int(rng.integers(0, length - repeats + 1))
            slots += [BLANK] * before + [DIGIT_WORDS[digit]] * repeats
            slots += [BLANK] * (length - repeats - before + self._draw_pause(rng))
        if not labels.digits:
            slots += [BLANK] * int(rng.integers(10, 40))
        return tuple(slots)

    def _draw_pause(self, rng: Rng) -> int:
        return 1 + int(rng.integers(0, 7) * self.pace)


def acoustic_words(labels: Labels) -> list[str]:
    """Return the attributes that the acoustic adapter should recognise, in a fixed order."""
    words: list[str] = []
    people = dict.fromkeys(zip(labels.speakers, labels.accents, labels.genders, strict=True))
    for _, accent, gender in people:
        words += [accent, gender] if accent else [gender]
    sound = labels.sound or "nothing"
    words += [word for word in (labels.loudness, labels.speed, sound) if word]
    if labels.melody:
        words += [labels.melody.direction, DIGIT_WORDS[labels.melody.notes], "notes"]
    return words


def spread_words(words: list[str], slots: int, rng: Rng) -> tuple[str, ...]:
    """Spread words over ``slots`` places in order, some repeated, with blanks elsewhere."""
    out = [BLANK] * slots
    places = np.sort(rng.choice(slots, len(words), replace=False)).tolist()
    for i, word in enumerate(words):
        end = places[i + 1] if i + 1 < len(words) else slots
        for slot in range(places[i], min(end, places[i] + int(rng.integers(1, 4)))):
            out[slot] = word
    return tuple(out)
