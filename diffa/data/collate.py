"""Rows of different lengths as one batch; padding is never part of a question or a recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.audio import pad
from diffa.data.rows import Row
from diffa.data.sample import DataError
from diffa.types import Vocab


class Batch(NamedTuple):
    """A batch to learn from.

    Attributes:
        tokens: prompts and answers, (B, L).
        answer: which tokens belong to the answers, (B, L) bool; EOS up to L included.
        seeds: one per row, (B,).
        audio_at: index before which each row's audio goes, (B,); None without audio.
        audio: waveforms, (B, S), or None.
        lengths: true samples of each, (B,), or None.
        labels: the samples' own.
        skipped: rows that were left out while this batch was made, and why.
    """

    tokens: Tensor
    answer: Tensor
    seeds: Tensor
    audio_at: Tensor | None
    audio: Tensor | None
    lengths: Tensor | None
    labels: tuple[Any, ...]
    skipped: tuple[str, ...]


    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return self._replace(
            tokens=self.tokens.to(device),
            answer=self.answer.to(device),
            seeds=self.seeds.to(device),
            audio_at=moved(self.audio_at),
            audio=moved(self.audio),
            lengths=moved(self.lengths),
        )


class Collate:
    """Pads rows: answers with EOS to the longest row, audio with zeros."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab = vocab

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return rows as a batch; raises DataError where some have audio and others none."""
        heard = [row.wave is not None for row in rows]
        if any(heard) and not all(heard):
            raise DataError("rows with and without audio share a batch; use a stage for each")
        size = max(len(row.tokens) for row in rows)
        tokens = torch.full((len(rows), size), self.vocab.eos, dtype=torch.long)
        answer = torch.ones(len(rows), size, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            answer[i, : len(row.answer)] = row.answer
        waves = [row.wave for row in rows if row.wave is not None]
        audio, lengths = pad(waves) if waves else (None, None)
        places = [row.audio_at for row in rows if row.audio_at is not None]
        return Batch(
            tokens,
            answer,
            torch.tensor([row.seed for row in rows]),
            torch.tensor(places) if places else None,
            audio,
            lengths,
            tuple(row.labels for row in rows),
            tuple(reason for row in rows for reason in row.skipped),
        )
