"""The memory of keys and values, and what a backbone's attention must respect."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Context(NamedTuple):
    """What a backbone's attention must respect; every field may be None for "no restriction".

    Attributes:
        valid: slots that exist, (B, S) bool.
        positions: RoPE positions of all S slots, (B, S); None when the queries are all slots.
        branch: the branch of each slot, (B, S); 0 is shared.
        slots: which slots the embeddings are, (B, K); None when they are all slots in order.
        sees: which slots each query may see besides, (B, K, S) bool.
        memory: where keys and values of the other slots are; None when there are no others.
        rows: which rows of the memory this batch is; None when they are all rows.
        write: whether the memory keeps what is computed now.
        asked: which of the K places will be read, (B, R); a backbone that is ``partial`` may leave
            the hidden states of the others unfinished.
        lengths: of the rows that a backbone has laid end to end to one, which see themselves alone.
    """

    valid: Tensor | None = None
    positions: Tensor | None = None
    branch: Tensor | None = None
    slots: Tensor | None = None
    sees: Tensor | None = None
    memory: Memory | None = None
    rows: Tensor | None = None
    write: bool = False
    asked: Tensor | None = None
    lengths: list[int] | None = None

    def mask(self, positions: Tensor, *, causal: bool) -> Tensor | None:
        """Return what queries at ``positions`` (B, K) may see, (B, K or 1, S) bool, or None."""
        mask = None if self.valid is None else self.valid[:, None, :]
        rules = []
        if self.branch is not None:
            own = self.branch if self.slots is None else self.branch.gather(1, self.slots)
            rules.append((self.branch[:, None] == 0) | (self.branch[:, None] == own[:, :, None]))
        if causal:
            keys = positions if self.positions is None else self.positions
            rules.append(keys[:, None] <= positions[:, :, None])
        if self.sees is not None:
            rules.append(self.sees)
        for rule in rules:
            mask = rule if mask is None else mask & rule
        return mask

    def remember(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Give a layer's new keys and values (B, K, H, D); get those of all slots, (B, S, H, D)."""
        if self.memory is None:
            return keys, values
        return self.memory.update(layer, keys, values, self.slots, self.rows, write=self.write)


class Memory:
    """Every layer's keys and values for every slot of a canvas, (B, S, H, D) per layer."""

    def __init__(self) -> None:
        self.probe: int | None = None  # the layer whose keys ``drift`` watches, -1 for the last
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._moved: Tensor | None = None
        self._rows = self._slots = 0

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
        """Overwrite ``slots`` of a layer and return the layer's keys and values for the rows."""
        if slots is None and rows is None:
            if write:
                self._watch(layer, keys, slots, rows)
                self._store(layer, keys, values)
            return keys, values
        if layer == len(self._keys):
            room = keys.new_zeros(self._rows, self._slots, *keys.shape[2:])
            self._store(layer, room, torch.zeros_like(room))
        old_keys, old_values = self._keys[layer], self._values[layer]
        if not write:
            old_keys, old_values = old_keys.clone(), old_values.clone()
        else:
            self._watch(layer, keys, slots, rows)
        where = self._where(slots, rows, keys)
        old_keys[where], old_values[where] = keys, values
        if rows is None:
            return old_keys, old_values
        return old_keys[rows], old_values[rows]

    def drift(self, slots: Tensor) -> Tensor:
        """Return 1 - cosine between the two latest keys of ``slots`` (B, K) at the probe layer."""
        if self._moved is None:
            raise ValueError("set memory.probe to a layer before the passes to compare")
        return self._moved.gather(1, slots)

    def reserve(self, rows: int, slots: int) -> None:
        """Say how many rows and slots there are; added slots hold zeros until computed."""
        more, self._rows, self._slots = slots - self._slots, rows, slots
        if not more or not self._keys:
            return
        for store in (self._keys, self._values):
            for layer, kept in enumerate(store):
                room = kept.new_zeros(rows, more, *kept.shape[2:])
                store[layer] = torch.cat([kept, room], dim=1)
        if self._moved is not None:
            self._moved = torch.cat([self._moved, self._moved.new_zeros(rows, more)], dim=1)

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if layer == len(self._keys):
            self._keys.append(keys)
            self._values.append(values)
        else:
            self._keys[layer], self._values[layer] = keys, values

    def _where(
        self, slots: Tensor | None, rows: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        if rows is None:
            rows = torch.arange(len(keys), device=keys.device)
        if slots is None:
            slots = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
        return rows[:, None], slots

    def _watch(self, layer: int, keys: Tensor, slots: Tensor | None, rows: Tensor | None) -> None:
        if self.probe is None or layer >= len(self._keys):
            return
        if layer != self.probe % len(self._keys):
            return
        where = self._where(slots, rows, keys)
        old = self._keys[layer]
        if self._moved is None:
            self._moved = old.new_zeros(old.shape[:2], dtype=torch.float32)
        now, before = keys.flatten(2).float(), old[where].flatten(2).float()
        self._moved[where] = 1 - torch.cosine_similarity(now, before, dim=-1)
