"""Pack rows of different lengths into one batch; padding never belongs to a prompt or to audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.audio import pad
from diffa.data.rows import TrainingRow
from diffa.data.samples import DataError
from diffa.types import Vocab


class Batch(NamedTuple):
    """A training batch: B rows about G recordings (several rows may ask about one recording).

    Attributes:
        tokens: Prompts and answers, (B, L), padded with EOS.
        answer: Which tokens belong to the answers, (B, L) bool.
        row_lengths: Tokens of each row, (B,). Nothing attends to what is beyond.
        seeds: Seed of each row's corruption, (B,).
        audio_at: Index of the token before which each row's audio goes, (B,), or None.
        audio_index: Which recording each row is about, (B,).
        audio: Waveforms, (G, S), or None.
        audio_lengths: Samples of each waveform, (G,), or None.
        audio_text: Tokens that stand for the audio, (G, N), or None.
        audio_text_lengths: Tokens of each ``audio_text``, (G,), or None.
        speech_start: How many tokens of each ``audio_text`` come before the transcript, (G,).
        ctc_targets: Tokens of an adapter's CTC loss, per recording, by adapter key.
        labels: The samples' own, per recording.
        progress: Position in the stage, from 0 to 1.
        skipped: Why rows that others of this batch replace were unusable.
    """

    tokens: Tensor
    answer: Tensor
    row_lengths: Tensor
    seeds: Tensor
    audio_at: Tensor | None
    audio_index: Tensor
    audio: Tensor | None
    audio_lengths: Tensor | None
    audio_text: Tensor | None
    audio_text_lengths: Tensor | None
    speech_start: Tensor
    ctc_targets: tuple[Mapping[str, Tensor], ...]
    labels: tuple[Any, ...]
    progress: float
    skipped: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; ``ctc_targets`` stay where they are."""
        tensors: Any = {
            name: value.to(device)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**tensors)


class Collate:
    """Pad rows: text with EOS to the longest row, audio with zeros.

    Args:
        vocab: The backbone's.
        learn_padding: Whether pads belong to the answers, as in DIFFA. Rows whose answers were
            padded already, one by one, need no further pads to learn from.
    """

    def __init__(self, vocab: Vocab, *, learn_padding: bool = True) -> None:
        self.vocab, self.learn_padding = vocab, learn_padding

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        """Return rows as a batch; raises DataError where some have audio and others none."""
        kinds = {(row.audio is not None, row.audio_text is not None) for row in rows}
        if len(kinds) > 1:
            raise DataError("rows with and without audio share a batch; use a stage for each")
        every = [one for row in rows for one in (row, *row.extra_rows)]
        tokens, lengths = _pad_tokens([row.tokens for row in every], self.vocab.eos)
        answer = torch.full_like(tokens, self.learn_padding, dtype=torch.bool)
        for i, row in enumerate(every):
            answer[i, : len(row.answer)] = row.answer
        waves = [row.audio for row in rows if row.audio is not None]
        audio, audio_lengths = pad(waves) if waves else (None, None)
        texts = [row.audio_text for row in rows if row.audio_text is not None]
        text, text_lengths = _pad_tokens(texts, self.vocab.eos) if texts else (None, None)
        places = [row.audio_at for row in every if row.audio_at is not None]
        return Batch(
            tokens=tokens,
            answer=answer,
            row_lengths=torch.full_like(lengths, tokens.shape[1])
            if self.learn_padding
            else lengths,
            seeds=torch.tensor([row.seed for row in every]),
            audio_at=torch.tensor(places) if places else None,
            audio_index=torch.tensor(
                [i for i, row in enumerate(rows) for _ in (row, *row.extra_rows)]
            ),
            audio=audio,
            audio_lengths=audio_lengths,
            audio_text=text,
            audio_text_lengths=text_lengths,
            speech_start=torch.tensor([row.speech_start for row in rows]),
            ctc_targets=tuple(row.ctc_targets or {} for row in rows),
            labels=tuple(row.labels for row in rows),
            progress=max(row.progress for row in rows),
            skipped=tuple(reason for row in rows for reason in row.skipped),
        )


def _pad_tokens(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Return tokens of different lengths as a batch (B, L), and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(list(rows), True, value), lengths
