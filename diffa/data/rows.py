"""From a sample to a row of a batch: audio read and altered, text as tokens, answer marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from diffa.audio import prepare, resample
from diffa.data.augment import Augment
from diffa.data.mixture import Mixture
from diffa.data.sample import DataError, OnError, Sample
from diffa.errors import DiffaError
from diffa.prompt import Chat
from diffa.types import Vocab

_TRIES = 50  # rows in a row that may be unusable before the data as a whole is


class Row(NamedTuple):
    """One row of a batch to be.

    Attributes:
        tokens: prompt and answer, (L,); empty where a stage reads no text.
        answer: which of them belong to the answer, (L,) bool.
        audio_at: index before which the audio goes; None without audio.
        wave: the audio, (S,), or None.
        seed: of the row's corruption.
        labels: the sample's own.
        skipped: rows given up before this one, and why.
    """

    tokens: Tensor
    answer: Tensor
    audio_at: int | None
    wave: Tensor | None
    seed: int
    labels: Any = None
    skipped: tuple[str, ...] = ()


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
        return Row(empty, empty.bool(), None, wave, seed, sample.labels)


class Answering:
    """Makes rows for learning to answer.

    Args:
        chat: writes questions and answers in the backbone's template.
        vocab: of the backbone; answers are padded with its EOS, which is learned too (DIFFA).
        hearing: reads the audio; None where the stage learns from text alone.
        answer_length: every answer's length, header and pads included; as long as it is if None.
        longest: tokens of a whole row at most (2048: DIFFA's limit).
    """

    def __init__(
        self,
        chat: Chat,
        vocab: Vocab,
        hearing: Hearing | None,
        *,
        answer_length: int | None = None,
        longest: int = 2048,
    ) -> None:
        self.chat, self.vocab, self.hearing = chat, vocab, hearing
        self.answer_length, self.longest = answer_length, longest

    def __call__(self, sample: Sample, seed: int) -> Row:
        """Return a sample's row; raises DataError for an answer that is empty or too long."""
        name = sample.key or "a sample"
        if not sample.target:
            raise DataError(f"{name} has an empty answer")
        wave = self.hearing(sample, seed) if self.hearing else None
        heard = wave is not None or sample.script is not None
        encoded = self.chat.encode_example(sample.question, sample.target, audio=heard)
        tokens, answer, at = encoded
        if sample.script is not None and at is not None:
            tokens, answer = self._spoken(tokens, answer, at, sample.script)
        tokens, answer = self._padded(tokens, answer, name)
        if len(tokens) > self.longest:
            raise DataError(f"{name} has {len(tokens)} tokens, more than {self.longest}")
        return Row(tokens, answer, None if wave is None else at, wave, seed, sample.labels)

    def _spoken(
        self, tokens: Tensor, answer: Tensor, at: int, script: str
    ) -> tuple[Tensor, Tensor]:
        """Put the script's tokens where the audio would go."""
        ids = self.chat.tokenizer(script, add_special_tokens=False)["input_ids"]
        middle = torch.tensor(ids, dtype=tokens.dtype)
        tokens = torch.cat([tokens[:at], middle, tokens[at:]])
        quiet = torch.zeros(len(middle), dtype=torch.bool)
        return tokens, torch.cat([answer[:at], quiet, answer[at:]])

    def _padded(self, tokens: Tensor, answer: Tensor, name: str) -> tuple[Tensor, Tensor]:
        size = int(answer.sum())
        if self.answer_length is None:
            return tokens, answer
        more = self.answer_length - size
        if more < 0:
            raise DataError(f"{name}: an answer of {size} tokens exceeds {self.answer_length}")
        return F.pad(tokens, (0, more), value=self.vocab.eos), F.pad(answer, (0, more), value=True)


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
                return self.make(sample, place.seed)._replace(skipped=tuple(skipped))
            except DiffaError as error:
                where = sample.key or f"sample {index}"
                reason = str(error) if where in str(error) else f"{where}: {error}"
                if self.on_error == "stop":
                    raise DataError(f"{reason} (--on-error skip leaves such rows out)") from error
                skipped.append(reason)
        raise DataError(f"{_TRIES} rows in a row are unusable, the last: {skipped[-1]}")

    def _fetch(self, source: Any, index: int, position: int) -> Sample:
        at = getattr(source, "at", None)
        sample: Sample = at(index, position / self.length) if at else source[index]
        return sample
