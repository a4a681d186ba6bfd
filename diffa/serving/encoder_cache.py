"""Audio embeddings of recent recordings, cached by content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from diffa.audio import pad
from diffa.canvas.batch import unpad_embeds
from diffa.canvas.prefix_cache import PrefixCache, content_key

if TYPE_CHECKING:
    from diffa.model import Model

_MAX_BATCH = 8  # recordings per encoder pass: while a longer one runs, decoding waits


class EncoderCache:
    """Encode recordings with ``model.listen`` and keep recent results (LRU); thread-safe.

    Args:
        model: its encoder and adapter make the embeddings.
        capacity: embeddings kept, summed over recordings. 0: none.

    Attributes:
        prefix_cache: keys and values of prompts, of up to 256 MiB, that a block-causal backbone
            need not compute again. None without capacity.
    """

    def __init__(self, model: Model, capacity: int) -> None:
        self._model, self._capacity, self._size = model, capacity, 0
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self.prefix_cache = PrefixCache(1 << 28) if capacity else None
        # Held for look-ups and insertions only: workers encode at the same time, and two that
        # encode the same recording do so twice rather than wait for each other.
        self._lock = threading.Lock()

    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor | Exception]:
        """Return the embeddings (N, W) of each waveform (S,), or its error."""
        keys = [content_key(b"audio", waveform) for waveform in waveforms]
        results: dict[bytes, Tensor | Exception] = {}
        with self._lock:
            for key in keys:
                if key in self._entries:
                    self._entries.move_to_end(key)
                    results[key] = self._entries[key]
        missing = {k: wave for k, wave in zip(keys, waveforms, strict=True) if k not in results}
        by_length = sorted(missing, key=lambda k: len(missing[k]))  # neighbours need little padding
        for start in range(0, len(by_length), _MAX_BATCH):
            batch = by_length[start : start + _MAX_BATCH]
            results.update(zip(batch, self._encode([missing[k] for k in batch]), strict=True))
        with self._lock:
            for key in by_length:
                self._insert(key, results[key])
        return [results[key] for key in keys]

    def _encode(self, waveforms: Sequence[Tensor]) -> Sequence[Tensor | Exception]:
        """Encode a batch; if that fails, each recording alone, so that one fault stays one."""
        try:
            return unpad_embeds(self._model.listen(*pad(waveforms)))
        except Exception as error:
            if len(waveforms) == 1:
                return [error]
            return [self._encode([waveform])[0] for waveform in waveforms]

    def _insert(self, key: bytes, embeds: Tensor | Exception) -> None:
        """Add an entry and evict the least recently used ones; the lock is held."""
        if isinstance(embeds, Exception) or len(embeds) > self._capacity or key in self._entries:
            return
        self._entries[key] = embeds.clone()  # a view would keep its whole batch in memory
        self._size += len(embeds)
        while self._size > self._capacity:
            self._size -= len(self._entries.popitem(last=False)[1])
