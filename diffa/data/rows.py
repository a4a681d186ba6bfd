"""Transforms from a sample to a row of a training batch, and the data set of a stage's rows."""

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
from diffa.data.samples import CurriculumSource, DataError, OnError, Sample, Source, derive_seed
from diffa.errors import describe_error
from diffa.types import Vocab

_MAX_SKIPPED = 50  # consecutive unusable rows after which the data as a whole is unusable


class TrainingRow(NamedTuple):
    """One row of a batch.

    Attributes:
        tokens: Prompt and answer, (L,). Empty for an encoder's rows, which have no text.
        answer: Which tokens belong to the answer, (L,) bool.
        seed: Seed of the row's corruption.
        audio_at: Index of the token before which the audio or its text goes; None without either.
        audio: Waveform (S,), or None.
        audio_text: Tokens that stand for the audio, (N,), or None.
        speech_start: How many tokens of ``audio_text`` come before the transcript.
        ctc_targets: Tokens of an adapter's CTC loss, by adapter key.
        labels: The sample's own.
        progress: Position in the stage, from 0 to 1.
        skipped: Why the rows that this one replaces were unusable.
        extra_rows: Further questions about the same audio; they have no audio of their own.
    """

    tokens: Tensor
    answer: Tensor
    seed: int
    audio_at: int | None = None
    audio: Tensor | None = None
    audio_text: Tensor | None = None
    speech_start: int = 0
    ctc_targets: Mapping[str, Tensor] | None = None
    labels: Any = None
    progress: float = 0.0
    skipped: tuple[str, ...] = ()
    extra_rows: tuple[TrainingRow, ...] = ()


class AudioTransform:
    """Read a sample's audio at ``rate`` and augment it."""

    def __init__(self, rate: int, augment: Augment | None = None) -> None:
        self.rate, self.augment = rate, augment

    def __call__(self, sample: Sample, seed: int) -> Tensor | None:
        """Return the waveform (S,) of a sample, or None without audio; raises AudioError."""
        if sample.audio is None:
            return None
        waveform = prepare(sample.audio, self.rate, strict=True)  # half an answer's audio misleads
        if sample.rate is not None:
            waveform = resample(waveform, sample.rate, self.rate)
        # The corruption draws from the seed's own stream: one more draw would tie them together.
        return self.augment(waveform, seed ^ 0x5EED) if self.augment else waveform


class EncoderTransform:
    """Make rows that train an encoder: audio and labels, no text."""

    def __init__(self, audio: AudioTransform) -> None:
        self.audio = audio

    def __call__(self, sample: Sample, seed: int) -> TrainingRow:
        """Return a sample's row; raises DataError without audio."""
        waveform = self.audio(sample, seed)
        if waveform is None:
            raise DataError(f"{sample.key or 'a sample'} has no audio, which an encoder needs")
        empty = torch.empty(0, dtype=torch.long)
        return TrainingRow(empty, empty.bool(), seed, audio=waveform, labels=sample.labels)


class AnswerTransform:
    """Make rows that train the answer to a question.

    Args:
        chat: Writes questions and answers in the backbone's template.
        vocab: The backbone's. Answers are padded with its EOS, which is learned too (DIFFA).
        audio: Reads the audio; None for a stage that learns from text alone.
        answer_lengths: Lengths to which answers are padded, without their header: the first that
            fits. Empty: answers are not padded.
        padding_share: Share of rows padded to any other length that fits.
        header_share: Share of rows whose assistant header belongs to the answer (DIFFA: all).
        max_length: Largest number of tokens of a row (DIFFA: 2048).
    """

    def __init__(
        self,
        chat: Chat,
        vocab: Vocab,
        audio: AudioTransform | None,
        *,
        answer_lengths: Sequence[int] = (),
        padding_share: float = 0.0,
        header_share: float = 1.0,
        max_length: int = 2048,
    ) -> None:
        self.chat, self.vocab, self.audio, self.max_length = chat, vocab, audio, max_length
        self.answer_lengths = sorted(answer_lengths)
        self.padding_share, self.header_share = padding_share, header_share
        self._word_ids: dict[str, list[int]] = {}

    def __call__(self, sample: Sample, seed: int) -> TrainingRow:
        """Return a sample's row; raises DataError for an answer that is empty or too long."""
        waveform = self.audio(sample, seed) if self.audio else None
        words = None if sample.audio_text is None else sample.audio_text.split(" ")
        has_audio = waveform is not None or words is not None
        pairs = [(sample.question, sample.target), *sample.extra_questions]
        rows = [
            self._row(pair, sample.key or "a sample", _question_seed(seed, number), has_audio)
            for number, pair in enumerate(pairs)
        ]
        targets = (sample.ctc_targets or {}).items()
        return rows[0]._replace(
            audio=waveform,
            audio_text=None if words is None else self._encode_words(words),
            speech_start=len(self._encode_words((words or [""])[: sample.speech_start])),
            ctc_targets={key: self._encode(text) for key, text in targets},
            labels=sample.labels,
            extra_rows=tuple(rows[1:]),
        )

    def _row(self, pair: tuple[str, str], name: str, seed: int, has_audio: bool) -> TrainingRow:
        """Return the row of one question and its answer, without the audio."""
        question, target = pair
        if not target:
            raise DataError(f"{name} has an empty answer")
        tokens, answer, at = self.chat.encode_example(question, target, audio=has_audio)
        # tokens: [prompt | assistant header | answer]; answer marks the last two, as DIFFA does.
        answer_start = len(self.chat.encode(question, audio=has_audio).tokens)
        rng = torch.Generator().manual_seed(derive_seed(seed, "row"))
        tokens, answer = self._pad_answer(tokens, answer, answer_start, name, rng)
        if float(torch.rand((), generator=rng)) >= self.header_share:
            answer = answer & (torch.arange(len(answer)) >= answer_start)
        if len(tokens) > self.max_length:
            raise DataError(f"{name} has {len(tokens)} tokens, more than {self.max_length}")
        return TrainingRow(tokens, answer, seed, at if has_audio else None)

    def _pad_answer(
        self, tokens: Tensor, answer: Tensor, answer_start: int, name: str, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if not self.answer_lengths:
            return tokens, answer
        size = len(tokens) - answer_start
        fitting = [length for length in self.answer_lengths if length >= size]
        if not fitting:
            raise DataError(f"{name}: an answer of {size} tokens exceeds {self.answer_lengths[-1]}")
        index = 0
        if float(torch.rand((), generator=rng)) < self.padding_share:
            index = int(torch.randint(len(fitting), (), generator=rng))
        pads = (0, fitting[index] - size)
        return F.pad(tokens, pads, value=self.vocab.eos), F.pad(answer, pads, value=True)

    def _encode_words(self, words: Sequence[str]) -> Tensor:
        """Return tokens of words one by one: no space comes between two special tokens."""
        ids = [token for word in words for token in self._encode_word(word)]
        return torch.tensor(ids, dtype=torch.long)

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._word_ids:
            special = self.chat.tokenizer.get_added_vocab().get(word)
            ids = [special] if special is not None else self._encode(f" {word}").tolist()
            self._word_ids[word] = ids
        return self._word_ids[word]

    def _encode(self, text: str) -> Tensor:
        ids = self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)


def _question_seed(seed: int, number: int) -> int:
    """Return a seed of each question's own; the seeds of a step's rows are consecutive."""
    return (seed + (number << 40)) % (1 << 63)


class PreferenceTransform:
    """Make rows of two answers: the chosen one, and the rejected one in ``extra_rows``.

    Args:
        answer: Makes the row of one answer.
        audio: Reads and augments the audio once for both.
    """

    def __init__(self, answer: AnswerTransform, audio: AudioTransform) -> None:
        self.answer, self.audio = answer, audio

    def __call__(self, sample: Sample, seed: int) -> TrainingRow:
        """Return a sample's row; raises DataError without a rejected answer.

        The two answers are corrupted by seeds of their own.
        """
        name = sample.key or "a sample"
        if not sample.rejected:
            raise DataError(f"{name} has no rejected answer")
        if sample.audio_text is not None or sample.extra_questions:
            raise DataError(f"{name}: preferences are about one question and real audio")
        sample = sample._replace(audio=self.audio(sample, seed), rate=None)
        preferred = self.answer(sample, seed)
        rejected = self.answer(sample._replace(target=str(sample.rejected)), seed)
        rejected = rejected._replace(
            seed=derive_seed(seed, "rejected"), audio=None, ctc_targets=None
        )
        return preferred._replace(extra_rows=(rejected,))


class TrainingDataset(Dataset[TrainingRow]):
    """All positions of a stage as a map-style data set of rows.

    A row that cannot be made ends the stage (``stop``), or the next row of its source replaces it
    and reports it in ``skipped`` (``skip``).
    """

    def __init__(
        self,
        mixture: Mixture,
        length: int,
        transform: Callable[[Sample, int], TrainingRow],
        on_error: OnError = "stop",
    ) -> None:
        self.mixture, self.length = mixture, length
        self.transform, self.on_error = transform, on_error

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> TrainingRow:
        if not 0 <= position < self.length:
            raise IndexError(position)
        drawn = self.mixture.draw(position)
        source = self.mixture.sources[drawn.source]
        skipped: list[str] = []
        for offset in range(_MAX_SKIPPED):
            index = (drawn.row + offset) % len(source)
            sample = self._sample(source, index, position)
            try:
                row = self.transform(sample, drawn.seed)
                return row._replace(skipped=tuple(skipped), progress=position / self.length)
            except Exception as error:  # whatever is wrong with a row is that row's error
                name = sample.key or f"sample {index}"
                reason = describe_error(error)
                reason = reason if name in reason else f"{name}: {reason}"
                if self.on_error == "stop":
                    raise DataError(f"{reason} (--on-error skip leaves such rows out)") from error
                skipped.append(reason)
        raise DataError(f"{_MAX_SKIPPED} rows in a row are unusable, the last: {skipped[-1]}")

    def _sample(self, source: Source, index: int, position: int) -> Sample:
        if isinstance(source, CurriculumSource):
            return source.at(index, position / self.length)
        return source[index]
