"""Where each row of a canvas works: blocks from left to right, each row at its own pace."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffa.types import Step

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Place(NamedTuple):
    """Where each row works now.

    Attributes:
        alive: rows with anything left to do, (B,) bool.
        block: the active block, (B,); its slots run from ``first`` to before ``end``, (B,).
        fresh: rows that have just entered their block, (B,) bool.
        step: steps since the start, (B,); ``since`` those since the block began.
        due: masks that the block began with, (B,).
        rows: the block's masked slots, (B, R), -1 where there are no more.
        places: the same, counted from the answer's start.
    """

    alive: Tensor
    block: Tensor
    first: Tensor
    end: Tensor
    fresh: Tensor
    step: Tensor
    since: Tensor
    due: Tensor
    rows: Tensor
    places: Tensor

    @property
    def masked(self) -> Tensor:
        """Which of ``rows`` there are, (B, R) bool."""
        return self.rows >= 0


class Blocks:
    """Follows every row through its blocks of ``width`` tokens."""

    def __init__(self, canvas: Canvas, width: int) -> None:
        self._canvas, self._width = canvas, width
        self._columns = torch.arange(width, device=canvas.tokens.device)
        self._block = torch.full_like(canvas.seeds, -1)
        self._step, self._entered, self._due = (torch.zeros_like(self._block) for _ in range(3))

    def enter(self) -> Place | None:
        """Return where the rows work now, or None when nothing is left to do."""
        canvas, width = self._canvas, self._width
        masked = canvas.undecided()
        alive = masked.any(dim=1)
        if not bool(alive.any()):
            return None
        block = torch.where(alive, masked.int().argmax(dim=1) // width, self._block)
        fresh = (block != self._block) & alive
        places = block[:, None] * width + self._columns
        inside = alive[:, None] & (places < canvas.length)
        open_ = masked.gather(1, places.clamp(0, canvas.length - 1)) & inside
        self._block = block
        self._entered = torch.where(fresh, self._step, self._entered)
        self._due = torch.where(fresh, open_.sum(dim=1), self._due)
        first = canvas.start + block.clamp(min=0) * width  # a row that was done at once has none
        rows = asked(torch.where(open_, canvas.start + places, -1))
        return Place(
            alive=alive,
            block=block,
            first=first,
            end=(first + width).clamp(max=canvas.start + canvas.length),
            fresh=fresh,
            step=self._step,
            since=self._step - self._entered,
            due=self._due,
            rows=rows,
            places=rows - canvas.start,
        )

    def advance(self, steps: Tensor | int = 1) -> None:
        """Count ``steps`` taken, for all rows or for each (B,)."""
        self._step = self._step + steps


def asked(slots: Tensor) -> Tensor:
    """Drop padding from slots (B, R). A GPU keeps it: a fixed shape, and no waiting for counts."""
    if slots.is_cuda:
        return slots
    most = int((slots >= 0).sum(dim=1).max())
    first = (slots < 0).sort(dim=1, stable=True).indices[:, :most]
    return slots.gather(1, first)


def end(canvas: Canvas, given: Tensor) -> None:
    """Fill rows with EOS behind a first EOS that has nothing undecided before it; tokens that
    were ``given`` (B, A) stay."""
    answer, eos = canvas.answer, canvas.vocab.eos
    ended = (answer == eos).cumsum(dim=1) > 0
    settled = ~((answer == canvas.vocab.mask) & ~ended).any(dim=1, keepdim=True)
    behind = ended & settled & (answer != eos) & ~given
    if bool(behind.any()):
        canvas.fill(behind, eos)


def snapshot(canvas: Canvas, revised: int | None = None, given: Tensor | None = None) -> Step:
    """The canvas as callers see it after a forward.

    Where tokens may still be ``revised`` in blocks of that width, only finished blocks are final.
    Where an EOS may still end a row, only what was ``given`` (B, A) or has no mask before it is.
    """
    masked = canvas.undecided()
    final = ~masked if given is None else given | (masked.cumsum(dim=1) == 0)
    if revised is not None:
        done = ~masked.any(dim=1, keepdim=True)
        first = masked.int().argmax(dim=1, keepdim=True) // revised * revised
        final = done | (torch.arange(canvas.length, device=masked.device) < first)
    return Step(canvas.answer.clone(), final, canvas.confidence.clone())
