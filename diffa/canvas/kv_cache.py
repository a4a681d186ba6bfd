"""The KV cache of a canvas, and the context that tells a backbone what may attend to what.

Shapes: B rows, S slots of the canvas, K queries (the slots computed in this pass), H key/value
heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.types import Steady


class AttentionContext(NamedTuple):
    """What each query may attend to, and where cached keys and values are.

    Attributes:
        valid: (B, S) bool, False for padding. None: all slots are valid.
        positions: (B, S) RoPE position of every slot. None: keys are at the queries' positions.
        branch: (B, S) branch of every slot; branch 0 is shared, others see themselves and 0.
            None: one branch.
        query_slots: (B, K) slot of each query. None: all slots, in order.
        attn_mask: (B or 1, K, S) bool, a further restriction per query. None: no restriction.
        has_rule: Whether ``attn_mask`` holds the rule of a causal or block-causal backbone too.
        kv_cache: Keys and values of the slots that are not computed in this pass.
        cache_rows: (B,) rows of the cache that this batch uses. None: all rows, in order.
        write: Whether the cache keeps the keys and values of this pass.
        output_slots: (B, R) queries whose hidden states are read. A backbone with
            ``partial = True`` may skip the last layer for all others.
        block_origin: (B,) position from which blocks of a block-causal backbone count; all slots
            before it are one block. None: position 0.
        num_keys: Only so many first slots may be attended to. None: all.
        row_lengths: Lengths of rows packed into one sequence (block-diagonal attention).
        steady: What passes with the same slots have in common. None: nothing is known.
    """

    valid: Tensor | None = None
    positions: Tensor | None = None
    branch: Tensor | None = None
    query_slots: Tensor | None = None
    attn_mask: Tensor | None = None
    has_rule: bool = False
    kv_cache: KVCache | StackedKVCache | None = None
    cache_rows: Tensor | None = None
    write: bool = False
    output_slots: Tensor | None = None
    block_origin: Tensor | None = None
    num_keys: int | None = None
    row_lengths: list[int] | None = None
    steady: Steady | None = None

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` returns, computed once for all passes with the same slots."""
        return compute() if self.steady is None else self.steady.once(name, compute)

    def mask(self, positions: Tensor, *, causal: bool, block_length: int = 1) -> Tensor | None:
        """Return the boolean mask (B, K or 1, S) of queries at ``positions`` (B, K).

        Args:
            positions: Position of each query.
            causal: Whether a query attends only to its own block and those before it.
            block_length: Positions per block; 1 is the attention of autoregressive models.

        Returns:
            The mask; None stands for "everything may be attended to".
        """
        mask = None if self.valid is None else self.valid[:, None, :]
        rules = []
        if self.branch is not None:
            branch = self.branch
            own = branch if self.query_slots is None else branch.gather(1, self.query_slots)
            rules.append((branch[:, None] == 0) | (branch[:, None] == own[:, :, None]))
        if causal and not self.has_rule:
            keys = positions if self.positions is None else self.positions
            own, other = (self.blocks(p, block_length) for p in (positions, keys))
            # Where no key is in a later block, nothing is hidden. A GPU is not asked: that waits.
            if (
                block_length == 1
                or own.is_cuda
                or bool((other.amax(dim=1) > own.amin(dim=1)).any())
            ):
                rules.append(other[:, None] <= own[:, :, None])
        if self.attn_mask is not None:
            rules.append(self.attn_mask)
        # (B, 1, S) and (B, K, S) rules broadcast: one row of keys where no rule needs more.
        for rule in rules:
            mask = rule if mask is None else mask & rule
        return mask

    def blocks(self, positions: Tensor, block_length: int) -> Tensor:
        """Return the number of the block of each position (B, K), -1 before the origin."""
        if self.block_origin is not None:
            positions = positions - self.block_origin[:, None]
        return (positions // block_length).clamp(min=-1)

    def update_cache(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, K, H, D); return those of all slots (B, S, H, D).

        Without a cache the new ones are all there are.
        """
        # Training and scoring run whole rows once: nothing is kept.
        if self.kv_cache is None:
            return keys, values
        keys, values = self.kv_cache.update(
            layer, keys, values, self.query_slots, self.cache_rows, write=self.write
        )
        return keys[:, : self.num_keys], values[:, : self.num_keys]

    def narrow(self, num_keys: int) -> AttentionContext:
        """Return the context without the slots behind the first ``num_keys``."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[..., :num_keys]

        return self._replace(
            valid=cut(self.valid), positions=cut(self.positions), branch=cut(self.branch),
            attn_mask=cut(self.attn_mask), num_keys=num_keys,
        )  # fmt: skip

    @classmethod
    def stack(
        cls, contexts: Sequence[AttentionContext], positions: Sequence[Tensor]
    ) -> AttentionContext:
        """Return the context of several canvases whose rows form one batch.

        Each row attends to its own canvas. Shorter canvases get slots that are not valid; shorter
        lists of queries repeat their first query, whose entry is then computed twice alike.

        Args:
            contexts: All of passes over whole canvases, or all of passes over some slots.
            positions: Position of each context's queries, (B, K).
        """
        keys = [
            own if context.positions is None else context.positions
            for context, own in zip(contexts, positions, strict=True)
        ]
        size, queries = max(k.shape[1] for k in keys), max(p.shape[1] for p in positions)
        # A slot that a shorter canvas lacks has to be hidden, whatever its context says.
        uneven = any(k.shape[1] < size for k in keys)

        def stacked(field: str, default: Callable[[int], Tensor]) -> Tensor | None:
            """Stack a field over all slots; contexts without it get its neutral value."""
            values = [getattr(context, field) for context in contexts]
            if all(value is None for value in values) and not (field == "valid" and uneven):
                return None
            filled = [default(i) if value is None else value for i, value in enumerate(values)]
            rows = [pad_slots(value, size) for value in filled]
            return torch.cat([pad_queries(r, queries) if r.dim() == 3 else r for r in rows])

        def all_true(i: int) -> Tensor:
            return torch.ones_like(keys[i], dtype=torch.bool)

        # All contexts compute some slots, or all whole canvases: ``batched_forward`` plans it.
        slots = [context.query_slots for context in contexts if context.query_slots is not None]
        outputs = [context.output_slots for context in contexts if context.output_slots is not None]
        width = max((output.shape[1] for output in outputs), default=0)
        cached = any(context.kv_cache is not None for context in contexts)
        # All canvases are of one backbone: all have an origin, or none has.
        origins = [c.block_origin for c in contexts if c.block_origin is not None]
        return cls(
            valid=stacked("valid", all_true),
            positions=torch.cat([pad_slots(k, size) for k in keys]),
            branch=stacked("branch", lambda i: torch.zeros_like(keys[i])),
            query_slots=torch.cat([pad_queries(s, queries) for s in slots]) if slots else None,
            attn_mask=stacked(
                "attn_mask", lambda i: all_true(i)[:, None].expand(-1, positions[i].shape[1], -1)
            ),
            kv_cache=StackedKVCache(contexts, [p.shape for p in positions], size)
            if cached
            else None,
            write=True,  # StackedKVCache asks each context for its own
            output_slots=torch.cat([pad_queries(o, width) for o in outputs])
            if len(outputs) == len(contexts)
            else None,
            block_origin=torch.cat(origins) if origins else None,
        )


def pad_slots(values: Tensor, size: int) -> Tensor:
    """Pad the last axis with zeros up to ``size``."""
    return F.pad(values, (0, size - values.shape[-1]))


def pad_queries(values: Tensor, count: int) -> Tensor:
    """Pad axis 1 up to ``count`` with its first entry."""
    missing = count - values.shape[1]
    if not missing:
        return values
    return torch.cat([values, values[:, :1].expand(-1, missing, *values.shape[2:])], dim=1)


class KVCache:
    """Keys and values of every layer for every slot of a canvas, (B, S, H, D) per layer.

    A slot's entry is overwritten whenever the slot is recomputed. Between two recomputations the
    entries of a bidirectional model are stale: that is the approximation of prefix and dual
    caches.

    Attributes:
        probe: Layer whose keys ``drift`` compares, -1 for the last. None: nothing is compared.
    """

    def __init__(self) -> None:
        self.probe: int | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._drift: Tensor | None = None
        self._num_rows = self._num_slots = 0
        self._places: tuple[Tensor | None, Tensor | None, Tensor] | None = None

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
        """Overwrite ``slots`` of a layer and return the layer's keys and values of ``rows``.

        Args:
            layer: Index of the layer.
            keys: New keys, (B, K, H, D).
            values: New values, (B, K, H, D).
            slots: Slot of each new entry, (B, K). None: all slots, in order.
            rows: Rows of the cache, (B,). None: all rows, in order.
            write: Keep the new entries; else they are used in this pass alone.
        """
        # A pass over everything: the new tensors become the cache, nothing is copied.
        if slots is None and rows is None:
            if write:
                self._measure_drift(layer, keys, slots, rows)
                self._store(layer, keys, values)
            return keys, values
        # The first pass may compute some slots: the others hold zeros and are not valid yet.
        if layer == len(self._keys):
            empty = keys.new_zeros(self._num_rows, self._num_slots, *keys.shape[2:])
            self._store(layer, empty, torch.zeros_like(empty))
        all_keys, all_values = self._keys[layer], self._values[layer]
        if write:
            self._measure_drift(layer, keys, slots, rows)
        else:
            # Drafts see their own keys in this pass; the cache must not.
            all_keys, all_values = all_keys.clone(), all_values.clone()
        places = self._flat_index(slots, rows, keys)
        for store, new in ((all_keys, keys), (all_values, values)):
            store.flatten(0, 1).index_copy_(0, places, new.flatten(0, 1))
        if rows is None:
            return all_keys, all_values
        return all_keys[rows], all_values[rows]

    @property
    def num_layers(self) -> int:
        """Layers that have keys and values."""
        return len(self._keys)

    def copy(self, row: int, first: int, last: int) -> Tensor:
        """Return keys and values of a row's slots from ``first`` to ``last``, (L, 2, K, H, D)."""
        pairs = zip(self._keys, self._values, strict=True)
        return torch.stack(
            [torch.stack([k[row, first:last], v[row, first:last]]) for k, v in pairs]
        )

    def preload(self, rows: Sequence[Tensor | None]) -> None:
        """Store what ``copy`` returned as the first slots of each row, before the first pass."""
        sample = next(row for row in rows if row is not None)
        for layer in range(len(sample)):
            shape = self._num_rows, self._num_slots, *sample.shape[3:]
            self._store(layer, sample.new_zeros(shape), sample.new_zeros(shape))
            for index, row in enumerate(rows):
                if row is not None:
                    here = index, slice(row.shape[2])
                    self._keys[layer][here], self._values[layer][here] = row[layer]

    def drift(self, slots: Tensor) -> Tensor:
        """Return 1 - cosine between the two latest keys of ``slots`` (B, K) at the probe layer."""
        if self._drift is None:
            raise ValueError("set kv_cache.probe to a layer before the passes to compare")
        return self._drift.gather(1, slots)

    def reserve(self, rows: int, slots: int) -> None:
        """Grow the cache to ``rows`` x ``slots``; new slots hold zeros until they are computed."""
        # Canvases that grow (DAEDAL) add slots at the end; twins come before the first pass.
        added, self._num_rows, self._num_slots = slots - self._num_slots, rows, slots
        if added:
            self._places = None
        if not added or not self._keys:
            return
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                store[layer] = torch.cat([old, old.new_zeros(rows, added, *old.shape[2:])], dim=1)
        if self._drift is not None:
            self._drift = torch.cat([self._drift, self._drift.new_zeros(rows, added)], dim=1)

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if layer == len(self._keys):
            self._keys.append(keys.contiguous())
            self._values.append(values.contiguous())
        elif keys.is_cuda and keys.shape == self._keys[layer].shape:
            # A captured graph reads these addresses.
            self._keys[layer].copy_(keys)
            self._values[layer].copy_(values)
        else:
            self._keys[layer], self._values[layer] = keys, values

    def _flat_index(self, slots: Tensor | None, rows: Tensor | None, keys: Tensor) -> Tensor:
        """Return the places (B * K,) of keys (B, K, ...) among all slots, once for all layers."""
        if self._places is None or self._places[0] is not slots or self._places[1] is not rows:
            at, column = self._index(slots, rows, keys)
            self._places = slots, rows, (at * self._num_slots + column).flatten()
        return self._places[2]

    def _index(
        self, slots: Tensor | None, rows: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the index of keys (B, K, ...) in the cache: rows (B, 1) and slots (B, K)."""
        if rows is None:
            rows = torch.arange(len(keys), device=keys.device)
        if slots is None:
            slots = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
        return rows[:, None], slots

    def _measure_drift(
        self, layer: int, keys: Tensor, slots: Tensor | None, rows: Tensor | None
    ) -> None:
        if self.probe is None or layer >= len(self._keys):
            return
        # Negative layers count from the end, which is known once a pass has run.
        if layer != self.probe % len(self._keys):
            return
        index = self._index(slots, rows, keys)
        old = self._keys[layer]
        if self._drift is None:
            self._drift = old.new_zeros(old.shape[:2], dtype=torch.float32)
        # Cosines over all heads at once, in float32: bfloat16 has no digits for 1 - cosine.
        new, before = keys.flatten(2).float(), old[index].flatten(2).float()
        self._drift[index] = 1 - torch.cosine_similarity(new, before, dim=-1)


class StackedKVCache:
    """The caches of several canvases as one, for a pass that they share.

    Args:
        contexts: Context of each canvas, with its own cache or none.
        shapes: Rows and queries (B, K) of each.
        size: Slots of the largest canvas.
    """

    def __init__(
        self, contexts: Sequence[AttentionContext], shapes: Sequence[torch.Size], size: int
    ) -> None:
        self._contexts, self._shapes, self._size = contexts, shapes, size

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
        """Let every canvas update its own cache; return the keys and values of all, padded."""
        all_keys = keys.new_zeros(len(keys), self._size, *keys.shape[2:])
        all_values = values.new_zeros(len(values), self._size, *values.shape[2:])
        # Rows of a canvas begin where those of the one before end; its queries stand first.
        first = 0
        for context, (count, queries) in zip(self._contexts, self._shapes, strict=True):
            here = slice(first, first + count)
            own = keys[here, :queries], values[here, :queries]
            if context.write and context.query_slots is None:
                # The cache keeps these tensors: a view would keep the whole batch alive.
                own = own[0].clone(), own[1].clone()
            own_keys, own_values = context.update_cache(layer, *own)
            all_keys[here, : own_keys.shape[1]] = own_keys
            all_values[here, : own_values.shape[1]] = own_values
            first = here.stop
        return all_keys, all_values
