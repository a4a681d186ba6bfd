"""The nano corpus as sources of samples: ``nano`` (speech) and ``nano-text`` (text alone)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch

from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.data.samples import Sample
from diffa.nano.corpus.examples import Examples
from diffa.nano.corpus.questions import WEIGHTS
from diffa.nano.corpus.shaping import RATE
from diffa.nano.corpus.text import Imitations, facts
from diffa.nano.corpus.utterances import Utterances


class Nano:
    """The nano corpus as samples: sample ``i`` follows from (seed, i), whatever the process.

    ``growth`` is a curriculum: pairs (progress, most digits), the last whose progress is reached
    holds; ``most`` where there is none. ``per`` samples in a row are about the same utterance;
    every sample asks ``questions`` of them at once. ``keep`` utterances stay in memory.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "test"] = "train",
        seed: int = 1,
        count: int = 50_000,
        kinds: Sequence[str] | None = None,
        per: int = 1,
        questions: int = 1,
        held_out: bool = False,
        fsdd: str | None = None,
        leave_out: Sequence[str] = (),
        synthetic: bool = True,
        most: int = 8,
        keep: int = 0,
        growth: Sequence[Sequence[float]] = (),
    ) -> None:
        chosen = tuple(kinds) if kinds else tuple(WEIGHTS)
        utterances = Utterances(split, seed, fsdd, tuple(leave_out), synthetic, most, keep)
        self.speakers = [voice.name for voice in utterances.voices]
        self._examples = Examples(
            utterances, count, kinds=chosen, per=per, questions=questions, held_out=held_out
        )
        self._growth = [(float(start), int(top)) for start, top in growth]
        self._grown: dict[int, Examples] = {}
        self._lengths: dict[int, float] = {}  # an epoch's order asks for every sample's

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._examples, index)

    def seconds(self, index: int) -> float:
        """Guess a sample's duration from its plan; enough to group samples by length."""
        clip = self._examples.clip(index)
        if clip not in self._lengths:
            plan = self._examples.utterances.scene(clip)
            self._lengths[clip] = 0.6 * len(plan.digits) if plan.digits else 2.0
        return self._lengths[clip]

    def at(self, index: int, progress: float) -> Sample:
        """Return sample ``index`` with as many digits as the curriculum allows by now."""
        reached = [top for start, top in self._growth if progress >= start]
        return self._sample(self._limited(reached[-1]) if reached else self._examples, index)

    def _limited(self, most: int) -> Any:
        if most not in self._grown:
            examples = copy.copy(self._examples)
            examples.utterances = copy.copy(examples.utterances)
            examples.utterances.most = most
            self._grown[most] = examples
        return self._grown[most]

    def _sample(self, examples: Any, index: int) -> Sample:
        made = examples[index]
        return Sample(
            target=made.answer,
            question=made.question,
            audio=torch.from_numpy(made.wave),
            rate=RATE,
            ctc_targets=self._spoken(made.labels),
            key=made.audio_id,
            labels=made.labels,
            extra_questions=made.more,
        )

    @staticmethod
    def _spoken(labels: Any) -> dict[str, str]:
        """What each adapter could say: the words, and how they sound."""
        words = " ".join(DIGIT_WORDS[digit] for digit in labels.digits)
        return {"semantic": words, "acoustic": " ".join(facts(labels))}


class NanoText:
    """The nano corpus as text alone: words and blanks at the pace of audio stand for it.

    ``growth`` is a curriculum: triples (progress, pace, most digits); see ``Imitations``. Every
    sample asks ``questions`` about its utterance, a share ``rewording`` of them in other words
    than the fixed phrases'.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        count: int = 200_000,
        acoustic: int = 16,
        most: int = 8,
        kinds: Sequence[str] | None = None,
        questions: int = 1,
        rewording: float = 0.0,
        growth: Sequence[Sequence[float]] = (),
    ) -> None:
        self._seed = seed
        self._fixed: dict[str, Any] = {"acoustic": acoustic, "kinds": tuple(kinds or WEIGHTS)}
        if not 0.0 <= rewording <= 1.0:
            raise ValueError(f"rewording is a share from 0 to 1, got {rewording}")
        self._fixed |= {"per": questions, "rewording": rewording}
        self.count, self.most = count, most
        self._growth = [(float(start), float(pace), int(top)) for start, pace, top in growth]
        self._made: dict[tuple[float, int], Any] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, 1.0, self.most)

    def at(self, index: int, progress: float) -> Sample:
        """Return sample ``index`` at the pace and with the digits that the curriculum allows."""
        reached = [(pace, top) for start, pace, top in self._growth if progress >= start]
        return self._sample(index, *(reached[-1] if reached else (1.0, self.most)))

    def _sample(self, index: int, pace: float, most: int) -> Sample:
        if (pace, most) not in self._made:
            self._made[pace, most] = Imitations(self._seed, pace=pace, most=most, **self._fixed)
        row = self._made[pace, most][index]
        first, *others = row.instructions
        return Sample(
            target=first.answer,
            question=first.question,
            audio_text=" ".join([*row.acoustic, *row.semantic]),
            speech_start=len(row.acoustic),
            key=f"nano-text-{index}",
            labels=row.labels,
            extra_questions=tuple((made.question, made.answer) for made in others),
        )
