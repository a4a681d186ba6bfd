"""From a sample to a row of a batch: audio read and altered, text as tokens, answer marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from diffa.audio import prepare, resample
from diffa.chat import Chat
from diffa.data.augment import Augment
from diffa.data.mixture import Mixture
from diffa.data.samples import CurriculumSource, DataError, OnError, Sample, Source, seed_of
from diffa.errors import DiffaError
from diffa.types import Vocab

_TRIES = 50  # rows in a row that may be unusable before the data as a whole is


class Row(NamedTuple):
    """One row of a batch to be.

    Attributes:
        tokens: prompt and answer, (L,); empty where a stage reads no text.
        answer: which of them belong to the answer, (L,) bool.
        seed: of the row's corruption.
        audio_at: index before which the audio or the script goes; None without either.
        wave: the audio, (S,), or None.
        script: tokens that stand for the audio, (N,), or None.
        spoken_from: how many of the script's tokens come before those that are spoken.
        spoken: tokens that adapters should say, by adapter key.
        labels: the sample's own.
        progress: of the stage, from 0 to 1.
        skipped: rows given up before this one, and why.
        more: rows that ask about the same audio; they have none of their own.
    """

    tokens: Tensor
    answer: Tensor
    seed: int
    audio_at: int | None = None
    wave: Tensor | None = None
    script: Tensor | None = None
    spoken_from: int = 0
    spoken: Mapping[str, Tensor] | None = None
    labels: Any = None
    progress: float = 0.0
    skipped: tuple[str, ...] = ()
    more: tuple[Row, ...] = ()


class Hearing:
    """Reads a sample's audio at ``rate`` and alters it; the first half of making a row."""

    def __init__(self, rate: int, augment: Augment | None = None) -> None:
        self.rate, self.augment = rate, augment

    def __call__(self, sample: Sample, seed: int) -> Tensor | None:
        """Return the waveform (S,) of a sample, or None; raises AudioError."""
        if sample.audio is None:
            return None
        wave = prepare(sample.audio, self.rate)
        if sample.rate is not None:
            wave = resample(wave, sample.rate, self.rate)
        # one more draw from the seed's own stream would tie the audio to the corruption
        return self.augment(wave, seed ^ 0x5EED) if self.augment else wave


class Listening:
    """Makes rows for learning to listen: audio and labels, no text."""

    def __init__(self, hearing: Hearing) -> None:
        self.hearing = hearing

    def __call__(self, sample: Sample, seed: int) -> Row:
        """Return a sample's row; raises DataError without audio."""
        wave = self.hearing(sample, seed)
        if wave is None:
            raise DataError(f"{sample.key or 'a sample'} has no audio to listen to")
        empty = torch.empty(0, dtype=torch.long)
        return Row(empty, empty.bool(), seed, wave=wave, labels=sample.labels)


class Answering:
    """Makes rows for learning to answer.

    Args:
        chat: writes questions and answers in the backbone's template.
        vocab: of the backbone; answers are padded with its EOS, which is learned too (DIFFA).
        hearing: reads the audio; None where the stage learns from text alone.
        answer_lengths: room for an answer, pads included and its header not: the first that it
            fits; as long as it is where empty.
        roomy: share of the rows that get any other room that fits.
        header: share of the rows whose assistant header belongs to the answer (DIFFA: all).
        longest: tokens of a whole row at most (2048: DIFFA's limit).
    """

    def __init__(
        self,
        chat: Chat,
        vocab: Vocab,
        hearing: Hearing | None,
        *,
        answer_lengths: Sequence[int] = (),
        roomy: float = 0.0,
        header: float = 1.0,
        longest: int = 2048,
    ) -> None:
        self.chat, self.vocab, self.hearing, self.longest = chat, vocab, hearing, longest
        self.rooms, self.roomy, self.header = sorted(answer_lengths), roomy, header
        self._words: dict[str, list[int]] = {}

    def __call__(self, sample: Sample, seed: int) -> Row:
        """Return a sample's row; raises DataError for an answer that is empty or too long."""
        wave = self.hearing(sample, seed) if self.hearing else None
        script = None if sample.script is None else self._script(sample.script.split(" "))
        heard = wave is not None or script is not None
        asked = [(sample.question, sample.target), *sample.more]
        rows = [
            self._asked(question, target, sample.key or "a sample", _apart(seed, number), heard)
            for number, (question, target) in enumerate(asked)
        ]
        spoken = {key: self._ids(text) for key, text in (sample.spoken or {}).items()}
        return rows[0]._replace(
            wave=wave,
            script=script,
            spoken_from=self._aside(sample),
            spoken=spoken,
            labels=sample.labels,
            more=tuple(rows[1:]),
        )

    def _aside(self, sample: Sample) -> int:
        """Tokens of the script before those that are spoken."""
        words = (sample.script or "").split(" ")[: sample.spoken_from]
        return len(self._script(words))

    def _asked(self, question: str, target: str, name: str, seed: int, heard: bool) -> Row:
        """Return the row of one question and its answer, without what is heard."""
        if not target:
            raise DataError(f"{name} has an empty answer")
        tokens, answer, at = self.chat.encode_example(question, target, audio=heard)
        begin = len(self._prompt(question, heard))
        draw = torch.Generator().manual_seed(seed_of(seed, "row"))
        tokens, answer = self._padded(tokens, answer, begin, name, draw)
        if float(torch.rand((), generator=draw)) >= self.header:
            answer = answer & (torch.arange(len(answer)) >= begin)
        if len(tokens) > self.longest:
            raise DataError(f"{name} has {len(tokens)} tokens, more than {self.longest}")
        return Row(tokens, answer, seed, at if heard else None)

    def _script(self, words: Sequence[str]) -> Tensor:
        """Tokens of words one by one: no space comes between two special tokens."""
        ids = [token for word in words for token in self._word(word)]
        return torch.tensor(ids, dtype=torch.long)

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            special = self.chat.tokenizer.get_added_vocab().get(word)
            self._words[word] = [special] if special is not None else self._ids(f" {word}").tolist()
        return self._words[word]

    def _ids(self, text: str) -> Tensor:
        ids = self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _prompt(self, question: str, heard: bool) -> Tensor:
        """The tokens before what an answer writes, its header included."""
        return self.chat.encode(question, audio=heard).tokens

    def _padded(
        self, tokens: Tensor, answer: Tensor, begin: int, name: str, draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if not self.rooms:
            return tokens, answer
        size = len(tokens) - begin
        fitting = [room for room in self.rooms if room >= size]
        if not fitting:
            raise DataError(f"{name}: an answer of {size} tokens exceeds {self.rooms[-1]}")
        chosen = 0
        if float(torch.rand((), generator=draw)) < self.roomy:
            chosen = int(torch.randint(len(fitting), (), generator=draw))
        more = fitting[chosen] - size
        return F.pad(tokens, (0, more), value=self.vocab.eos), F.pad(answer, (0, more), value=True)


def _apart(seed: int, number: int) -> int:
    """A seed of its own for each question; those of a step's rows are consecutive."""
    return (seed + (number << 40)) % (1 << 63)


class Stream(Dataset[Row]):
    """All positions of a stage as one map-style data set of rows.

    A row that cannot be made is replaced by the next of its source and reported in ``skipped``
    of the one that takes its place (``skip``), or ends the stage (``stop``).
    """

    def __init__(
        self,
        mixture: Mixture,
        length: int,
        make: Callable[[Sample, int], Row],
        on_error: OnError = "stop",
    ) -> None:
        self.mixture, self.length, self.make, self.on_error = mixture, length, make, on_error

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Row:
        if not 0 <= position < self.length:
            raise IndexError(position)
        place = self.mixture.place(position)
        source = self.mixture.sources[place.source]
        skipped: list[str] = []
        for offset in range(_TRIES):
            index = (place.row + offset) % len(source)
            sample = self._fetch(source, index, position)
            try:
                row = self.make(sample, place.seed)
                return row._replace(skipped=tuple(skipped), progress=position / self.length)
            except DiffaError as error:
                where = sample.key or f"sample {index}"
                reason = str(error) if where in str(error) else f"{where}: {error}"
                if self.on_error == "stop":
                    raise DataError(f"{reason} (--on-error skip leaves such rows out)") from error
                skipped.append(reason)
        raise DataError(f"{_TRIES} rows in a row are unusable, the last: {skipped[-1]}")

    def _fetch(self, source: Source, index: int, position: int) -> Sample:
        if isinstance(source, CurriculumSource):
            return source.at(index, position / self.length)
        return source[index]
