"""Pack rows of different lengths into one sequence, so that nothing is computed for padding.

batch (B = 2, K = 4)        packed (1, N = 5)
[ a0 a1 a2 .. ]
[ b0 b1 .. .. ]    <->      [ a0 a1 a2 b0 b1 ]      lengths = [3, 2]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext


class PackedRows(NamedTuple):
    """Which of B * K slots are real.

    Attributes:
        slot_index: (N,) indices of the real slots among B * K, in order.
        shape: B and K.
        lengths: real slots of each row.
    """

    slot_index: Tensor
    shape: tuple[int, int]
    lengths: list[int]

    def pack(self, x: Tensor) -> Tensor:
        """Return the real slots of x (B, K, ...) as one row, (1, N, ...)."""
        return x.flatten(0, 1)[self.slot_index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Return x (1, N, ...) as a batch (B, K, ...), with zeros for padding."""
        out = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        out[self.slot_index] = x[0]
        return out.view(*self.shape, *x.shape[2:])

    def pack_context(self, context: AttentionContext) -> AttentionContext:
        """Return the context of the packed row; its cache receives unpacked keys and values."""
        cache: Any = None if context.kv_cache is None else _UnpackingCache(self, context)
        assert context.output_slots is not None  # see ``is_packable``
        return context._replace(
            valid=None,
            positions=None,
            kv_cache=cache,
            cache_rows=None,
            output_slots=self._packed_slots(context.output_slots),
            row_lengths=self.lengths,
            steady=None,
        )

    def _packed_slots(self, slots: Tensor) -> Tensor:
        """Return where slots (B, R) are in the packed row, (1, B * R).

        Padding gets the place of the real slot before it: nobody reads it.
        """
        real = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long, device=slots.device)
        real[self.slot_index] = 1
        place = real.cumsum(0).sub(1).clamp(min=0).view(self.shape)
        return place.gather(1, slots).view(1, -1)


class _UnpackingCache:
    """A canvas's KV cache that receives the keys and values of packed rows."""

    def __init__(self, rows: PackedRows, context: AttentionContext) -> None:
        self._rows, self._context = rows, context

    def update(
        self, layer: int, keys: Tensor, values: Tensor, *_: Tensor | None, write: bool
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (1, N, H, D) and return them: they are those of all slots.

        Slots, rows and ``write`` come from the canvas's own context.
        """
        del write
        unpack = self._rows.unpack
        self._context.update_cache(layer, unpack(keys), unpack(values))
        return keys, values


def pack_rows(context: AttentionContext, embeds: Tensor) -> PackedRows | None:
    """Return how to pack embeddings (B, K, W); None where packing is impossible or not faster.

    A batch without padding has nothing to gain, and a row without real slots cannot be packed.
    """
    if context.valid is None or not is_packable(context) or not supports_packing(embeds):
        return None
    lengths: list[int] = context.valid.sum(dim=1).tolist()
    rows, longest = embeds.shape[:2]
    if min(lengths, default=longest) in (0, longest):
        return None
    return PackedRows(context.valid.flatten().nonzero()[:, 0], (rows, longest), lengths)


def supports_packing(embeds: Tensor) -> bool:
    """Return whether rows are packed on the embeddings' device: on a CPU, without gradients.

    On a CPU, attention row by row costs what attention in a batch does. In training, gradient
    checkpointing must recompute a batch to the last bit, so batches stay as they are.
    """
    return embeds.device.type == "cpu" and not torch.is_grad_enabled()


def is_packable(context: AttentionContext) -> bool:
    """Return whether all slots are computed, attend to their whole row, and outputs are set.

    Without ``output_slots`` the caller may read any state, padding included.
    """
    unrestricted = context.branch is None and context.attn_mask is None
    return context.query_slots is None and unrestricted and context.output_slots is not None
