"""Several questions about one recording in one row: they share it, and do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError


class Pack(NamedTuple):
    """One recording with everything that is asked about it.

    Attributes:
        prefix: embeddings of the prompt up to the audio, and of the audio, (P, W).
        rows: the rows that ask, by their number in the batch.
        tails: embeddings of each row from the audio on, (T, W).
        at: index in the rows before which the audio goes.
    """

    prefix: Tensor
    rows: list[int]
    tails: list[Tensor]
    at: int


class Packing:
    """Reads rows as ``inputs.read`` does, but those of one recording as one.

    Every question sees the prompt's beginning, the recording and itself; the recording does not
    see the questions, which it does in a row of its own. So the hidden states differ from those
    of ``inputs.read``: a way to train several times faster, not to answer. A model that is to
    answer has to learn from rows of their own as well.

    Args:
        owner: which recording each row is about, (B,); None reads every row alone, to the states
            of ``inputs.read``, for the sake of ``places``.

    Attributes:
        places: where each row's tokens are among all slots of the last reading, (B, L).
    """

    def __init__(self, owner: Tensor | None) -> None:
        self.owner = owner
        self.places: Tensor | None = None

    def __call__(
        self,
        backbone: Any,
        tokens: Tensor,
        lengths: Tensor,
        heard: Sequence[Tensor | None] | None = None,
        audio_at: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden state of every token of rows (B, L), (B, L, W); see ``inputs.read``.

        Raises:
            SpecError: rows of one owner differ before the audio.
        """
        at = torch.zeros_like(lengths) if audio_at is None else audio_at
        owner = list(range(len(tokens))) if self.owner is None else self.owner.tolist()
        _check_shared(owner, tokens, at.tolist())
        words = backbone.embed(tokens)
        packs = _packs(owner, words, lengths.tolist(), heard, at.tolist())
        sequences = [torch.cat([pack.prefix, *pack.tails]) for pack in packs]
        values = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        positions, branch, places = _layout(packs, values, len(tokens), tokens.shape[1])
        self.places = places
        apart = None if self.owner is None else branch
        context = AttentionContext(valid=branch >= 0, branch=apart)
        hidden: Tensor = backbone(values, positions, context)
        return hidden.flatten(0, 1)[places]


def _check_shared(owner: list[int], tokens: Tensor, at: list[int]) -> None:
    """Refuse rows that would be read with the beginning of another."""
    first: dict[int, Tensor] = {}
    for name, row, place in zip(owner, tokens, at, strict=True):
        if not torch.equal(first.setdefault(name, row[:place]), row[:place]):
            raise SpecError(
                "aids.packed: questions about one recording differ before the audio; put <audio> "
                "before {question} in prompt.user"
            )


def _packs(
    owner: list[int],
    words: Tensor,
    lengths: list[int],
    heard: Sequence[Tensor | None] | None,
    at: list[int],
) -> list[Pack]:
    packs: dict[int, Pack] = {}
    for row, name in enumerate(owner):
        if name not in packs:
            sound = None if heard is None else heard[row]
            shared = [words[row, : at[row]], *([] if sound is None else [sound.to(words.dtype)])]
            packs[name] = Pack(torch.cat(shared), [], [], at[row])
        packs[name].rows.append(row)
        packs[name].tails.append(words[row, at[row] : lengths[row]])
    return list(packs.values())


def _layout(
    packs: list[Pack], values: Tensor, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions and branches (G, S), and where each token of each row is, (B, L)."""
    count, slots = values.shape[:2]
    positions = torch.zeros(count, slots, dtype=torch.long)
    branch = torch.full((count, slots), -1)  # padding: of no branch, and not valid
    places = torch.zeros(rows, length, dtype=torch.long)
    for number, pack in enumerate(packs):
        shared, start = len(pack.prefix), len(pack.prefix)
        positions[number, :shared] = torch.arange(shared)
        branch[number, :shared] = 0
        for own, (row, tail) in enumerate(zip(pack.rows, pack.tails, strict=True), start=1):
            end = start + len(tail)
            positions[number, start:end] = torch.arange(shared, shared + len(tail))
            branch[number, start:end] = own
            first = number * slots
            places[row, : pack.at] = first + torch.arange(pack.at)
            places[row, pack.at : pack.at + len(tail)] = first + torch.arange(start, end)
            start = end
    return positions.to(values.device), branch.to(values.device), places.to(values.device)
