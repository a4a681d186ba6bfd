"""Several questions about one recording in one row: they share it and do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError


class PackedRow(NamedTuple):
    """One recording and all questions about it.

    Attributes:
        prefix: Embeddings of the prompt up to the audio, and of the audio, (P, W).
        rows: Numbers of the questions' rows in the batch.
        suffixes: Embeddings of each row from the audio on, (T, W).
        audio_at: Index in the rows before which the audio goes.
    """

    prefix: Tensor
    rows: list[int]
    suffixes: list[Tensor]
    audio_at: int


class LayerState(NamedTuple):
    """The input of one layer in one pass of the backbone.

    Attributes:
        states: (G, S, W).
        positions: (G, S).
        context: What the attention respected.
    """

    states: Tensor
    positions: Tensor
    context: AttentionContext


class Packing:
    """Run the backbone as ``diffa.canvas.batch.read`` does, rows of one recording packed in one.

        row 1   prompt audio question answer             packed   prompt audio q1 a1 q2 a2
        row 2   prompt audio question answer             branch   0      0     1  1  2  2

    A question attends to the prompt, the audio and its own branch. The audio does not attend to
    the questions, which it does in a row of its own, so the hidden states differ from those of
    ``read``: packing trains several times faster, but a model also needs whole rows to answer.

    Args:
        owner: Recording of each row, (B,). None: every row alone, with the states of ``read``.
        layer: Layer whose input is kept in ``layer_state``. None: no layer's.

    Attributes:
        slots: Slot of each row's tokens among all G * S slots of the last pass, (B, L).
        layer_state: Input of ``layer`` in the last pass.
    """

    def __init__(self, owner: Tensor | None, *, layer: int | None = None) -> None:
        self.owner, self.layer = owner, layer
        self.slots: Tensor | None = None
        self.layer_state: LayerState | None = None

    def __call__(
        self,
        backbone: Any,
        tokens: Tensor,
        lengths: Tensor,
        audio: Sequence[Tensor | None] | None = None,
        audio_at: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden state of every token of rows (B, L), (B, L, W).

        Raises:
            SpecError: Rows of one recording differ before the audio.
        """
        at = torch.zeros_like(lengths) if audio_at is None else audio_at
        # Without owners every row is its own recording: the layout is that of ``forward_rows``.
        owner = list(range(len(tokens))) if self.owner is None else self.owner.tolist()
        _check_prefixes(owner, tokens, at.tolist())
        packed = _pack(owner, backbone.embed(tokens), lengths.tolist(), audio, at.tolist())
        # (shared prefix, then every suffix) per recording, padded to the longest: (G, S, W)
        sequences = [torch.cat([row.prefix, *row.suffixes]) for row in packed]
        embeds = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        positions, branch, self.slots = _layout(packed, embeds, len(tokens), tokens.shape[1])
        context = AttentionContext(valid=branch >= 0, branch=None if self.owner is None else branch)
        hidden: Tensor
        if self.layer is None:
            hidden = backbone(embeds, positions, context)
        else:
            # The backbone replaces the value of the key by that layer's input.
            inputs: dict[int, Tensor] = {self.layer: embeds}
            hidden = backbone(embeds, positions, context, inputs)
            self.layer_state = LayerState(inputs[self.layer], positions, context)
        # (G, S, W) -> (G * S, W) -> (B, L, W): a prefix is read by all of its rows.
        return hidden.flatten(0, 1)[self.slots]


def _check_prefixes(owner: list[int], tokens: Tensor, audio_at: list[int]) -> None:
    """Refuse rows that would share the beginning of another."""
    prefixes: dict[int, Tensor] = {}
    for name, row, at in zip(owner, tokens, audio_at, strict=True):
        if not torch.equal(prefixes.setdefault(name, row[:at]), row[:at]):
            raise SpecError(
                "question_packing: questions about one recording differ before the audio; put "
                "<audio> before {question} in prompt.user"
            )


def _pack(
    owner: list[int],
    embeds: Tensor,
    lengths: list[int],
    audio: Sequence[Tensor | None] | None,
    audio_at: list[int],
) -> list[PackedRow]:
    packed: dict[int, PackedRow] = {}
    for row, name in enumerate(owner):
        # The first row of a recording brings prefix and audio; the others only their questions.
        at = audio_at[row]
        if name not in packed:
            clip = None if audio is None else audio[row]
            prefix = [embeds[row, :at], *([] if clip is None else [clip.to(embeds.dtype)])]
            packed[name] = PackedRow(torch.cat(prefix), [], [], at)
        packed[name].rows.append(row)
        packed[name].suffixes.append(embeds[row, at : lengths[row]])
    return list(packed.values())


def _layout(
    packed: list[PackedRow], embeds: Tensor, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions and branches (G, S), and the slot of each token of each row, (B, L)."""
    count, size = embeds.shape[:2]
    positions = torch.zeros(count, size, dtype=torch.long)
    branch = torch.full((count, size), -1)  # padding has no branch and is not valid
    slots = torch.zeros(rows, length, dtype=torch.long)
    for number, pack in enumerate(packed):
        # ``first`` counts slots of the packed rows before: slots index the flattened batch.
        shared, start, first = len(pack.prefix), len(pack.prefix), number * size
        positions[number, :shared] = torch.arange(shared)
        branch[number, :shared] = 0
        for own, (row, suffix) in enumerate(zip(pack.rows, pack.suffixes, strict=True), start=1):
            end = start + len(suffix)
            # every question continues at the position after the audio
            positions[number, start:end] = torch.arange(shared, shared + len(suffix))
            branch[number, start:end] = own
            slots[row, : pack.audio_at] = first + torch.arange(pack.audio_at)
            slots[row, pack.audio_at : pack.audio_at + len(suffix)] = first + torch.arange(
                start, end
            )
            start = end
    return positions.to(embeds.device), branch.to(embeds.device), slots.to(embeds.device)
