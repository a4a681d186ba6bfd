"""The one call that drives a backbone over a canvas: recompute slots, return rows' logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffa.canvas.canvas import Canvas, first_for_padding, first_real
from diffa.canvas.kv_cache import Context, Memory
from diffa.types import Backbone


class Denoiser:
    """The ``denoise`` call of one canvas: runs the backbone, keeps the memory, counts forwards."""

    def __init__(self, backbone: Backbone, canvas: Canvas) -> None:
        self.memory = Memory()
        self.forwards = 0
        self._backbone = backbone
        self._canvas = canvas

    def __call__(
        self,
        recompute: Tensor | None,
        rows: Tensor,
        *,
        sees: Tensor | None = None,
        write: bool = True,
    ) -> Tensor:
        """Run the backbone over ``recompute`` (B, K; None: all) and return logits of ``rows``.

        Indices may be padded with -1. A row whose indices are all -1 (its ``rows`` where
        ``recompute`` is None) is left alone, and its logits are zero. ``rows`` (B, R) must be
        among the recomputed slots.
        """
        canvas = self._canvas
        self.memory.reserve(len(canvas.tokens), canvas.size)
        if canvas.twins:
            rows = rows.repeat(2, 1)
            recompute = None if recompute is None else recompute.repeat(2, 1)
            sees = None if sees is None else sees.repeat(2, 1, 1)
        self.forwards += 1
        busy = ((rows if recompute is None else recompute) >= 0).any(dim=1)
        if bool(busy.all()):
            at = self._places(rows, recompute)
            return self._logits(self._hidden(recompute, None, at, sees, write=write), at)
        part = busy.nonzero()[:, 0]
        slots = None if recompute is None else recompute[part]
        at = self._places(rows[part], slots)
        hidden = self._hidden(slots, part, at, None if sees is None else sees[part], write=write)
        found = self._logits(hidden, at)
        logits = found.new_zeros(len(rows), *found.shape[1:])
        logits[part] = found
        return logits

    def _hidden(
        self,
        slots: Tensor | None,
        rows: Tensor | None,
        at: Tensor,
        sees: Tensor | None,
        *,
        write: bool,
    ) -> Tensor:
        """Hidden states of ``slots``; each row's padding repeats its first slot, harmlessly."""
        canvas = self._canvas
        pick: Callable[[Tensor], Tensor] = (lambda x: x) if rows is None else (lambda x: x[rows])
        content, positions = pick(canvas.content), pick(canvas.positions)
        context = Context(
            valid=pick(canvas.valid) if canvas.ragged else None,
            positions=positions,
            branch=None if canvas.branch_of is None else pick(canvas.branch_of),
            sees=sees,
            memory=self.memory if write or slots is not None else None,
            rows=rows,
            write=write,
            asked=at.clamp(min=0) if getattr(self._backbone, "partial", False) else None,
        )
        if slots is None:
            return self._backbone(content, positions, context)
        if sees is not None:
            first = sees.gather(1, first_real(slots)[:, :, None].expand(-1, 1, sees.shape[2]))
            context = context._replace(sees=torch.where((slots < 0)[:, :, None], first, sees))
        slots = first_for_padding(slots)
        embeds = content.gather(1, slots[:, :, None].expand(-1, -1, content.shape[2]))
        return self._backbone(embeds, positions.gather(1, slots), context._replace(slots=slots))

    def _places(self, rows: Tensor, slots: Tensor | None) -> Tensor:
        """Where each of ``rows`` (B, R) stands among the recomputed slots; -1 stays."""
        if slots is None:
            return rows
        place = rows.new_zeros(len(rows), self._canvas.size)
        steps = torch.arange(slots.shape[1], device=rows.device).expand_as(slots)
        place.scatter_(1, first_for_padding(slots), steps)
        return torch.where(rows < 0, -1, place.gather(1, rows.clamp(min=0)))

    def _logits(self, hidden: Tensor, at: Tensor) -> Tensor:
        """Logits (B, R, V) of the places ``at``: nothing else ever meets the vocabulary."""
        asked = hidden.gather(1, at.clamp(min=0)[:, :, None].expand(-1, -1, hidden.shape[2]))
        there = at >= 0
        if asked.is_cuda or bool(there.all()):
            return self._backbone.head(asked)
        found = self._backbone.head(asked[there])
        logits = found.new_zeros(*at.shape, found.shape[-1])
        logits[there] = found
        return logits
