"""The KV cache of a canvas, and the context that tells a backbone what may attend to what.

Shapes: B rows, S slots of the canvas, K queries (the slots computed in this pass), H key/value
heads, D width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionContext(NamedTuple):
    """What each query may attend to, and where cached keys and values are.

    Attributes:
        valid: (B, S) bool, False for padding. None: all slots are valid.
        positions: (B, S) RoPE position of every slot. None: the queries are all slots.
        branch: (B, S) branch of every slot; branch 0 is shared, others see themselves and 0.
            None: one branch.
        query_slots: (B, K) slot of each query. None: all slots, in order.
        attn_mask: (B, K, S) bool, a further restriction per query. None: no restriction.
        kv_cache: keys and values of the slots that are not computed in this pass.
        cache_rows: (B,) rows of the cache that this batch uses. None: all rows, in order.
        write: whether the cache keeps the keys and values of this pass.
        output_slots: (B, R) queries whose hidden states are read. A backbone with
            ``partial = True`` may skip the last layer for all others.
        row_lengths: lengths of rows packed into one sequence (block-diagonal attention).
    """

    valid: Tensor | None = None
    positions: Tensor | None = None
    branch: Tensor | None = None
    query_slots: Tensor | None = None
    attn_mask: Tensor | None = None
    kv_cache: KVCache | None = None
    cache_rows: Tensor | None = None
    write: bool = False
    output_slots: Tensor | None = None
    row_lengths: list[int] | None = None

    def mask(self, positions: Tensor, *, causal: bool) -> Tensor | None:
        """Return the boolean mask (B, K or 1, S) of queries at ``positions`` (B, K).

        None stands for "everything may be attended to".
        """
        mask = None if self.valid is None else self.valid[:, None, :]
        rules = []
        if self.branch is not None:
            branch = self.branch
            own = branch if self.query_slots is None else branch.gather(1, self.query_slots)
            rules.append((branch[:, None] == 0) | (branch[:, None] == own[:, :, None]))
        if causal:
            keys = positions if self.positions is None else self.positions
            rules.append(keys[:, None] <= positions[:, :, None])
        if self.attn_mask is not None:
            rules.append(self.attn_mask)
        for rule in rules:
            mask = rule if mask is None else mask & rule
        return mask

    def update_cache(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, K, H, D); return those of all slots (B, S, H, D).

        Without a cache the new ones are all there are.
        """
        if self.kv_cache is None:
            return keys, values
        return self.kv_cache.update(
            layer, keys, values, self.query_slots, self.cache_rows, write=self.write
        )


class KVCache:
    """Keys and values of every layer for every slot of a canvas, (B, S, H, D) per layer.

    A slot's entry is overwritten whenever the slot is recomputed. Between two recomputations the
    entries of a bidirectional model are stale: that is the approximation of a dual cache.

    Attributes:
        probe: layer whose keys ``drift`` compares, -1 for the last. None: nothing is compared.
    """

    def __init__(self) -> None:
        self.probe: int | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._drift: Tensor | None = None
        self._num_rows = self._num_slots = 0

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
            layer: index of the layer.
            keys: new keys, (B, K, H, D).
            values: new values, (B, K, H, D).
            slots: slot of each new entry, (B, K). None: all slots, in order.
            rows: rows of the cache, (B,). None: all rows, in order.
            write: keep the new entries; else they are used in this pass alone.
        """
        if slots is None and rows is None:
            if write:
                self._measure_drift(layer, keys, slots, rows)
                self._store(layer, keys, values)
            return keys, values
        if layer == len(self._keys):
            empty = keys.new_zeros(self._num_rows, self._num_slots, *keys.shape[2:])
            self._store(layer, empty, torch.zeros_like(empty))
        all_keys, all_values = self._keys[layer], self._values[layer]
        if not write:
            all_keys, all_values = all_keys.clone(), all_values.clone()
        else:
            self._measure_drift(layer, keys, slots, rows)
        index = self._index(slots, rows, keys)
        all_keys[index], all_values[index] = keys, values
        if rows is None:
            return all_keys, all_values
        return all_keys[rows], all_values[rows]

    def drift(self, slots: Tensor) -> Tensor:
        """Return 1 - cosine between the two latest keys of ``slots`` (B, K) at the probe layer."""
        if self._drift is None:
            raise ValueError("set kv_cache.probe to a layer before the passes to compare")
        return self._drift.gather(1, slots)

    def reserve(self, rows: int, slots: int) -> None:
        """Grow the cache to ``rows`` x ``slots``; new slots hold zeros until they are computed."""
        added, self._num_rows, self._num_slots = slots - self._num_slots, rows, slots
        if not added or not self._keys:
            return
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                store[layer] = torch.cat([old, old.new_zeros(rows, added, *old.shape[2:])], dim=1)
        if self._drift is not None:
            self._drift = torch.cat([self._drift, self._drift.new_zeros(rows, added)], dim=1)

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if layer == len(self._keys):
            self._keys.append(keys)
            self._values.append(values)
        else:
            self._keys[layer], self._values[layer] = keys, values

    def _index(
        self, slots: Tensor | None, rows: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Index of keys (B, K, ...) in the cache: rows (B, 1) and slots (B, K)."""
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
        if layer != self.probe % len(self._keys):
            return
        index = self._index(slots, rows, keys)
        old = self._keys[layer]
        if self._drift is None:
            self._drift = old.new_zeros(old.shape[:2], dtype=torch.float32)
        new, before = keys.flatten(2).float(), old[index].flatten(2).float()
        self._drift[index] = 1 - torch.cosine_similarity(new, before, dim=-1)
