"""Rows of different lengths as one batch; padding is never part of a question or a recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.audio import pad
from diffa.data.rows import Row
from diffa.data.samples import DataError
from diffa.types import Vocab


class Batch(NamedTuple):
    """A batch to learn from.

    Attributes:
        tokens: prompts and answers, (B, L).
        answer: which tokens belong to the answers, (B, L) bool.
        sizes: true tokens per row, (B,); what is behind them is seen by nothing.
        seeds: one per row, (B,).
        audio_at: index before which each row's audio or script goes, (B,); None without.
        owner: which of the G recordings or scripts each row is about, (B,).
        audio: waveforms, (G, S), or None.
        lengths: true samples of each, (G,), or None.
        script: tokens that stand for the audio, (G, N), or None.
        scripts: true tokens of each script, (G,), or None.
        spoken_from: tokens of each script before those that are spoken, (G,).
        spoken: what adapters should say: tokens per recording, by adapter key.
        labels: the samples' own, per recording.
        progress: of the stage, from 0 to 1.
        skipped: rows that were left out while this batch was made, and why.
    """

    tokens: Tensor
    answer: Tensor
    sizes: Tensor
    seeds: Tensor
    audio_at: Tensor | None
    owner: Tensor
    audio: Tensor | None
    lengths: Tensor | None
    script: Tensor | None
    scripts: Tensor | None
    spoken_from: Tensor
    spoken: tuple[Mapping[str, Tensor], ...]
    labels: tuple[Any, ...]
    progress: float
    skipped: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; what adapters should say stays where it is."""
        moved: Any = {
            name: value.to(device)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)


class Collate:
    """Pads rows: text with EOS to the longest row, audio with zeros.

    ``learned`` pads belong to the answers, as in DIFFA; where every answer has room of its own
    already they do not, and nothing sees them.
    """

    def __init__(self, vocab: Vocab, *, learned: bool = True) -> None:
        self.vocab, self.learned = vocab, learned

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return rows as a batch; raises DataError where some have audio and others none."""
        kinds = {(row.wave is not None, row.script is not None) for row in rows}
        if len(kinds) > 1:
            raise DataError("rows with and without audio share a batch; use a stage for each")
        asked = [one for row in rows for one in (row, *row.more)]
        tokens, sizes = _padded([row.tokens for row in asked], self.vocab.eos)
        answer = torch.full_like(tokens, self.learned, dtype=torch.bool)
        for i, row in enumerate(asked):
            answer[i, : len(row.answer)] = row.answer
        waves = [row.wave for row in rows if row.wave is not None]
        audio, lengths = pad(waves) if waves else (None, None)
        words = [row.script for row in rows if row.script is not None]
        script, scripts = _padded(words, self.vocab.eos) if words else (None, None)
        places = [row.audio_at for row in asked if row.audio_at is not None]
        return Batch(
            tokens=tokens,
            answer=answer,
            sizes=torch.full_like(sizes, tokens.shape[1]) if self.learned else sizes,
            seeds=torch.tensor([row.seed for row in asked]),
            audio_at=torch.tensor(places) if places else None,
            owner=torch.tensor([i for i, row in enumerate(rows) for _ in (row, *row.more)]),
            audio=audio,
            lengths=lengths,
            script=script,
            scripts=scripts,
            spoken_from=torch.tensor([row.spoken_from for row in rows]),
            spoken=tuple(row.spoken or {} for row in rows),
            labels=tuple(row.labels for row in rows),
            progress=max(row.progress for row in rows),
            skipped=tuple(reason for row in rows for reason in row.skipped),
        )


def _padded(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Return tokens of different lengths as a batch (B, L), and lengths (B,)."""
    sizes = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(sizes.max())), value, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, sizes
