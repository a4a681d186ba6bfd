"""The ``denoise`` call of a canvas: one forward pass over some slots, logits of some of them.

Shapes: B rows, S slots, K recomputed slots, R slots whose logits are returned, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffa.canvas.canvas import Canvas, first_index, repeat_first
from diffa.canvas.kv_cache import AttentionContext, KVCache
from diffa.errors import DecodingError
from diffa.types import Backbone, PartialBackbone

# Passes that no sampler needs, whatever its rule: it decides, corrects or inserts tokens.
_PASSES_PER_TOKEN, _MORE_PASSES = 64, 4096


class Denoiser:
    """The ``denoise`` call of one canvas: runs the backbone, keeps the KV cache, counts passes.

    Attributes:
        kv_cache: Keys and values of every slot computed so far.
        num_forwards: Forward passes of the backbone until now.
    """

    def __init__(self, backbone: Backbone, canvas: Canvas) -> None:
        self.kv_cache = KVCache()
        self.num_forwards = 0
        self._backbone = backbone
        self._canvas = canvas
        self._partial = isinstance(backbone, PartialBackbone) and backbone.partial
        self._total: Tensor | None = None  # of all logits until now

    def __call__(
        self,
        recompute: Tensor | None,
        output_slots: Tensor,
        *,
        attn_mask: Tensor | None = None,
        write: bool = True,
    ) -> Tensor:
        """Run the backbone over ``recompute`` and return the logits (B, R, V) of ``output_slots``.

        Args:
            recompute: Slots to compute again, (B, K). None: all slots.
            output_slots: Slots whose logits are returned, (B, R), a subset of ``recompute``.
            attn_mask: Which slots each recomputed slot may attend to besides, (B, K, S) bool.
            write: Whether the cache keeps the new keys and values.

        Raises:
            DecodingError: The logits are not finite (on a GPU ``check_finite`` tells), or the
                sampler does not end.

        Slots may be padded with -1. A row whose slots are all -1 (its ``output_slots`` where
        ``recompute`` is None) is not computed, and its logits are zero.
        """
        canvas = self._canvas
        self.kv_cache.reserve(len(canvas.tokens), canvas.size)
        if canvas.twins:
            output_slots = output_slots.repeat(2, 1)
            recompute = None if recompute is None else recompute.repeat(2, 1)
            attn_mask = None if attn_mask is None else attn_mask.repeat(2, 1, 1)
        attention = canvas.attention
        if attention is not None and attention.shifted:
            # The token of a slot is predicted by the state of the slot before it.
            output_slots = canvas.previous_slots(output_slots)
        self.num_forwards += 1
        if self.num_forwards > _PASSES_PER_TOKEN * canvas.length + _MORE_PASSES:
            raise DecodingError(
                f"the sampler has not ended after {self.num_forwards - 1} forward passes over "
                f"{canvas.length} tokens"
            )
        # Only the active rows are computed: a row that is finished costs nothing.
        rows = self._active_rows(output_slots if recompute is None else recompute)
        if rows is None:
            return self._forward(recompute, output_slots, attn_mask, None, write=write)
        recompute = None if recompute is None else recompute[rows]
        attn_mask = None if attn_mask is None else attn_mask[rows]
        computed = self._forward(recompute, output_slots[rows], attn_mask, rows, write=write)
        logits = computed.new_zeros(len(output_slots), *computed.shape[1:])
        logits[rows] = computed
        return logits

    def _active_rows(self, slots: Tensor) -> Tensor | None:
        """Return the rows of slots (B, K) that are not -1 alone; None stands for all."""
        if self._canvas.steady is not None:
            return self._canvas.steady.rows
        active = (slots >= 0).any(dim=1)
        return None if bool(active.all()) else active.nonzero()[:, 0]

    def _forward(
        self,
        slots: Tensor | None,
        output_slots: Tensor,
        attn_mask: Tensor | None,
        rows: Tensor | None,
        *,
        write: bool,
    ) -> Tensor:
        """Return logits (B, R, V) of ``output_slots`` after a pass over ``slots`` of ``rows``."""
        canvas = self._canvas
        index = self._index_among(output_slots, slots)
        pick: Callable[[Tensor], Tensor] = (lambda x: x) if rows is None else (lambda x: x[rows])
        content, positions = pick(canvas.content), pick(canvas.positions)
        context = AttentionContext(
            valid=pick(canvas.valid) if canvas.ragged else None,
            positions=positions,
            branch=None if canvas.branches is None else pick(canvas.branches),
            attn_mask=attn_mask,
            kv_cache=self.kv_cache if write or slots is not None else None,
            cache_rows=rows,
            write=write,
            block_origin=None if canvas.block_origin is None else pick(canvas.block_origin),
            output_slots=index.clamp(min=0) if self._partial else None,
            steady=canvas.steady,
        )
        if slots is not None:
            if attn_mask is not None:
                first = first_index(slots)[:, :, None].expand(-1, 1, attn_mask.shape[2])
                padding = (slots < 0)[:, :, None]
                mask = torch.where(padding, attn_mask.gather(1, first), attn_mask)
                context = context._replace(attn_mask=mask)
            # Padding repeats the row's first slot: the same keys are written twice.
            own = slots
            slots = context.once("slots", lambda: repeat_first(own))
            content = content.gather(1, slots[:, :, None].expand(-1, -1, content.shape[2]))
            everywhere = positions
            positions = context.once("positions", lambda: everywhere.gather(1, slots))
            context = context._replace(query_slots=slots)
            if canvas.attention is not None and not slots.is_cuda:
                # Nothing attends to blocks behind the last that is computed.
                numbers = pick(canvas.block_numbers(canvas.attention.length))
                visible = numbers <= numbers.gather(1, slots).amax(dim=1, keepdim=True)
                context = context.narrow(int(visible.any(dim=0).nonzero()[-1]) + 1)
        return self._logits(self._backbone(content, positions, context), index)

    def _index_among(self, output_slots: Tensor, slots: Tensor | None) -> Tensor:
        """Return the index of ``output_slots`` (B, R) among the recomputed slots; -1 stays."""
        if slots is None:
            return output_slots
        canvas, recomputed = self._canvas, slots

        def invert() -> Tensor:
            index = recomputed.new_zeros(len(recomputed), canvas.size)
            order = torch.arange(recomputed.shape[1], device=index.device).expand_as(recomputed)
            return index.scatter_(1, repeat_first(recomputed), order)

        index = invert() if canvas.steady is None else canvas.steady.once("index", invert)
        return torch.where(output_slots < 0, -1, index.gather(1, output_slots.clamp(min=0)))

    def _logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Return logits (B, R, V) at ``index`` (B, R), zero where it is -1.

        With a vocabulary of 126,464 the head costs as much as several layers: it is applied to
        these states only.
        """
        states = hidden.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, hidden.shape[2]))
        real = index >= 0
        # On a GPU, indexing with ``real`` would wait for the device (``nonzero``).
        if states.is_cuda or bool(real.all()):
            logits = self._backbone.head(states)
            self._note_finite(logits)
            return logits
        some = self._backbone.head(states[real])
        self._note_finite(some)
        logits = some.new_zeros(*index.shape, some.shape[-1])
        logits[real] = some
        return logits

    def _note_finite(self, logits: Tensor) -> None:
        """Check logits; on a GPU only note whether they were finite, without waiting for it."""
        # NaN and infinity spread to the sum, which is faster than a test of every number.
        total = logits.sum(dtype=torch.float32)
        self._total = total if self._total is None else self._total + total
        if not total.is_cuda:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise DecodingError if logits were not finite; waits for a GPU."""
        if self._total is not None and not bool(self._total.isfinite()):
            raise DecodingError(
                f"the backbone's logits hold NaN or infinite numbers after {self.num_forwards} "
                "forward passes: its weights are damaged, or the recording has samples of an "
                "extreme size"
            )
