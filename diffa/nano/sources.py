"""The nano corpus as sources of samples: ``nano`` (speech) and ``nano-text`` (text alone)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from diffa.data.samples import Sample
from diffa.nano.corpus.examples import Examples
from diffa.nano.corpus.questions import TASK_WEIGHTS, transcript
from diffa.nano.corpus.shaping import RATE
from diffa.nano.corpus.text import AudioTexts, acoustic_words
from diffa.nano.corpus.utterances import Utterances


class Nano:
    """Composed utterances of the nano corpus; sample ``i`` follows from (seed, i) alone.

    Args:
        split: Recordings to compose from.
        seed: Random seed of the corpus.
        count: Number of samples.
        tasks: Kinds of question (keys of ``TASK_WEIGHTS``). Default: all.
        samples_per_utterance: Consecutive samples about one utterance.
        questions_per_sample: Questions that each sample asks about its utterance.
        held_out_phrases: Ask in phrases that are left out of training.
        fsdd: Folder of the FSDD recordings. Default: the environment's DIFFA_FSDD.
        exclude_speakers: FSDD speakers to leave out.
        synthetic_voices: Use espeak-ng's voices besides the recordings.
        max_digits: Largest number of digits in an utterance.
        cached_utterances: Utterances that stay in memory.
        curriculum: Pairs (progress, max_digits); the last whose progress is reached applies.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "test"] = "train",
        seed: int = 1,
        count: int = 50_000,
        tasks: Sequence[str] | None = None,
        samples_per_utterance: int = 1,
        questions_per_sample: int = 1,
        held_out_phrases: bool = False,
        fsdd: str | None = None,
        exclude_speakers: Sequence[str] = (),
        synthetic_voices: bool = True,
        max_digits: int = 8,
        cached_utterances: int = 0,
        curriculum: Sequence[Sequence[float]] = (),
    ) -> None:
        utterances = Utterances(
            split,
            seed,
            fsdd,
            tuple(exclude_speakers),
            synthetic_voices,
            max_digits,
            cached_utterances,
        )
        self.speakers = [voice.name for voice in utterances.voices]
        self._examples = Examples(
            utterances,
            count,
            tasks=tuple(tasks or TASK_WEIGHTS),
            samples_per_utterance=samples_per_utterance,
            questions_per_sample=questions_per_sample,
            held_out_phrases=held_out_phrases,
        )
        self._curriculum = [(float(start), int(digits)) for start, digits in curriculum]
        self._stages: dict[int, Examples] = {}
        self._seconds: dict[int, float] = {}  # an epoch's order asks for every sample's

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._examples, index)

    def seconds(self, index: int) -> float:
        """Estimate a sample's duration from its plan; enough to group samples by length."""
        number = self._examples.utterance_index(index)
        if number not in self._seconds:
            digits = self._examples.utterances.scene(number).digits
            self._seconds[number] = 0.6 * len(digits) if digits else 2.0
        return self._seconds[number]

    def at(self, index: int, progress: float) -> Sample:
        """Return sample ``index`` with as many digits as the curriculum allows by now."""
        reached = [digits for start, digits in self._curriculum if progress >= start]
        if not reached:
            return self[index]
        if reached[-1] not in self._stages:
            self._stages[reached[-1]] = self._examples.with_max_digits(reached[-1])
        return self._sample(self._stages[reached[-1]], index)

    def _sample(self, examples: Examples, index: int) -> Sample:
        example = examples[index]
        return Sample(
            target=example.answer,
            question=example.question,
            audio=torch.from_numpy(example.audio),
            rate=RATE,
            ctc_targets={
                "semantic": transcript(example.labels, silence=""),
                "acoustic": " ".join(acoustic_words(example.labels)),
            },
            key=example.audio_id,
            labels=example.labels,
            extra_questions=example.extra_questions,
        )


class NanoText:
    """The nano corpus as text: words and blanks at the pace of audio stand for the audio.

    Args:
        seed: Random seed of the corpus.
        count: Number of samples.
        acoustic_slots: Embeddings of the acoustic adapter that the text stands for.
        max_digits: Largest number of digits in an utterance.
        tasks: Kinds of question (keys of ``TASK_WEIGHTS``). Default: all.
        questions_per_sample: Questions that each sample asks about its utterance.
        paraphrase_share: Share of the questions that are paraphrased, from 0 to 1.
        curriculum: Triples (progress, pace, max_digits); the last whose progress is reached
            applies. Pace 0 writes every word once between single blanks, 1 is that of speech.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        count: int = 200_000,
        acoustic_slots: int = 16,
        max_digits: int = 8,
        tasks: Sequence[str] | None = None,
        questions_per_sample: int = 1,
        paraphrase_share: float = 0.0,
        curriculum: Sequence[Sequence[float]] = (),
    ) -> None:
        if not 0.0 <= paraphrase_share <= 1.0:
            raise ValueError(f"paraphrase_share is a share from 0 to 1, got {paraphrase_share}")
        self.count, self.max_digits = count, max_digits
        self._options: dict[str, Any] = {
            "seed": seed,
            "acoustic_slots": acoustic_slots,
            "tasks": tuple(tasks or TASK_WEIGHTS),
            "questions_per_sample": questions_per_sample,
            "paraphrase_share": paraphrase_share,
        }
        self._curriculum = [
            (float(start), float(pace), int(top)) for start, pace, top in curriculum
        ]
        self._stages: dict[tuple[float, int], AudioTexts] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, 1.0, self.max_digits)

    def at(self, index: int, progress: float) -> Sample:
        """Return sample ``index`` at the pace and with the digits that the curriculum allows."""
        reached = [stage[1:] for stage in self._curriculum if progress >= stage[0]]
        return self._sample(index, *(reached[-1] if reached else (1.0, self.max_digits)))

    def _sample(self, index: int, pace: float, max_digits: int) -> Sample:
        stage = pace, max_digits
        if stage not in self._stages:
            self._stages[stage] = AudioTexts(pace=pace, max_digits=max_digits, **self._options)
        text = self._stages[stage][index]
        first, *others = text.instructions
        return Sample(
            target=first.answer,
            question=first.question,
            audio_text=" ".join([*text.acoustic, *text.semantic]),
            speech_start=len(text.acoustic),
            key=f"nano-text-{index}",
            labels=text.labels,
            extra_questions=tuple((other.question, other.answer) for other in others),
        )
