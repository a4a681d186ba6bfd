"""Rows of different lengths laid end to end to one: nothing is computed for padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext


class Ragged(NamedTuple):
    """Which of B * K slots are real.

    Attributes:
        places: theirs among all, flat and in order, (N,).
        shape: B and K.
        lengths: real slots of each row.
    """

    places: Tensor
    shape: tuple[int, int]
    lengths: list[int]

    def pack(self, x: Tensor) -> Tensor:
        """Lay the real slots of x (B, K, ...) end to end, (1, N, ...)."""
        return x.flatten(0, 1)[self.places][None]

    def spread(self, x: Tensor) -> Tensor:
        """Put x (1, N, ...) back where it came from, (B, K, ...), with zeros for padding."""
        out = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        out[self.places] = x[0]
        return out.view(*self.shape, *x.shape[2:])

    def context(self, context: AttentionContext) -> AttentionContext:
        """The context of the rows as one; a memory gets keys and values as the canvas has them."""
        memory: Any = None if context.kv_cache is None else _Spread(self, context)
        assert context.output_slots is not None  # see ``lays_end_to_end``
        asked = self._among_real(context.output_slots)
        return context._replace(
            valid=None,
            positions=None,
            kv_cache=memory,
            cache_rows=None,
            output_slots=asked,
            row_lengths=self.lengths,
        )

    def _among_real(self, asked: Tensor) -> Tensor:
        """Where the places ``asked`` (B, R) stand among the real slots, (1, B * R); padding, which
        nobody reads, stands where the real slot before it does."""
        real = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long, device=asked.device)
        real[self.places] = 1
        place = real.cumsum(0).sub(1).clamp(min=0).view(self.shape)
        return place.gather(1, asked).view(1, -1)


class _Spread:
    """A canvas's memory where keys and values arrive packed."""

    def __init__(self, ragged: Ragged, context: AttentionContext) -> None:
        self._ragged, self._context = ragged, context

    def update(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        slots: Tensor | None,
        rows: Tensor | None,
        *,
        write: bool,
    ) -> tuple[Tensor, Tensor]:
        """Let the canvas remember; of all slots, those just computed are all there are."""
        del slots, rows, write  # the canvas's own context has them
        self._context.update_cache(layer, self._ragged.spread(keys), self._ragged.spread(values))
        return keys, values


def ragged(context: AttentionContext, embeds: Tensor) -> Ragged | None:
    """How to pack embeddings (B, K, W), or None where that is not possible or does not pay.

    On a CPU attention row by row costs what attention in a batch does. Training keeps its batches:
    what was computed before is to be computed again to the last bit.
    """
    if context.valid is None or not lays_end_to_end(context) or not supported(embeds):
        return None
    lengths: list[int] = context.valid.sum(dim=1).tolist()
    rows, most = embeds.shape[:2]
    if min(lengths, default=most) in (0, most):  # a row of nothing, or nothing to leave out
        return None
    return Ragged(context.valid.flatten().nonzero()[:, 0], (rows, most), lengths)


def supported(embeds: Tensor) -> bool:
    """Whether rows are packed where the embeddings are."""
    return embeds.device.type == "cpu" and not torch.is_grad_enabled()


def lays_end_to_end(context: AttentionContext) -> bool:
    """Whether all slots are computed, each sees its whole row, and who calls has said which states
    are read: whoever watches a layer finds rows as they are, and nothing else is packed."""
    alone = context.query_slots is None and context.branch is None and context.attn_mask is None
    return alone and context.output_slots is not None
