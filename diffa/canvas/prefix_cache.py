"""Share what was computed for a recording or a prompt between questions.

Keys and values of a block-causal backbone depend on nothing behind their own block. So whole blocks
at the beginning of a prompt are stored and used again, exactly, by every prompt that begins alike::

    template <audio> question A            blocks that both prompts share are computed once
    template <audio> question B
    |--- shared ----|
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffa.errors import SpecError, check_at_least
from diffa.types import BlockAttention

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas
    from diffa.canvas.kv_cache import KVCache


class PrefixCache:
    """Embeddings of recordings, and keys and values of prompts, kept by content (LRU); thread-safe.

    A cache belongs to the first model that uses it; its weights must not change meanwhile.

    Args:
        max_bytes: Memory of all entries; the least recently used ones are dropped. Default: 1 GiB.

    Attributes:
        reused: Blocks of prompts that were not computed again.
        size: Bytes in use.

    Raises:
        SpecError: ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        check_at_least(0, max_bytes=max_bytes)
        self.max_bytes, self.size, self.reused = max_bytes, 0, 0
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._owner: weakref.ref[Any] | None = None

    def bind(self, owner: Any) -> None:
        """Tie the cache to a model's backbone; raises SpecError if it has another one's entries."""
        with self._lock:
            if self._owner is not None and self._owner() is not owner:
                raise SpecError("this PrefixCache belongs to another model: make a new one")
            self._owner = weakref.ref(owner)

    def encode(
        self, waves: Sequence[Tensor], encode: Callable[[list[Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """Return the embeddings (N, W) of waveforms (S,), encoding those that are not stored."""
        keys = [content_key(b"audio", wave) for wave in waves]
        known = {key: self._get(key) for key in keys}
        missing = {k: wave for k, wave in zip(keys, waves, strict=True) if known[k] is None}
        fresh = dict(zip(missing, encode(list(missing.values())) if missing else [], strict=True))
        for key, embeds in fresh.items():
            self._put(key, embeds.clone())  # a view would keep its whole batch in memory
        known.update(fresh)
        return [entry for key in keys if (entry := known[key]) is not None]

    def load(self, canvas: Canvas, kv_cache: KVCache) -> None:
        """Copy what is known of each row's prompt into its KV cache, before the first pass."""
        attention = canvas.attention
        if attention is None or attention.from_prompt:
            return
        rows = [self._known_blocks(keys) for keys in _prompt_keys(canvas, attention)]
        # A shifted backbone reads the first answer token off the prompt's last state.
        most = [(int(n) - attention.shifted) // attention.length for n in canvas.prompt_lengths]
        rows = [blocks[:count] for blocks, count in zip(rows, most, strict=True)]
        if not any(rows):
            return
        kv_cache.reserve(len(canvas.tokens), canvas.size)
        kv_cache.preload([torch.cat(blocks, dim=2) if blocks else None for blocks in rows])
        canvas.stored_blocks = torch.tensor([len(blocks) for blocks in rows]).to(canvas.seeds)
        self.reused += sum(map(len, rows))

    def store(self, canvas: Canvas, kv_cache: KVCache) -> None:
        """Keep the whole blocks of each row's prompt, once they were computed."""
        attention = canvas.attention
        if attention is None or attention.from_prompt or kv_cache.num_layers == 0:
            return
        for row, keys in enumerate(_prompt_keys(canvas, attention)):
            for number, key in enumerate(keys):
                if self._get(key) is None:
                    first = number * attention.length
                    self._put(key, kv_cache.copy(row, first, first + attention.length))

    def _known_blocks(self, keys: Sequence[bytes]) -> list[Tensor]:
        """Return the stored blocks of a prompt up to the first that is missing."""
        blocks: list[Tensor] = []
        for key in keys:
            if (entry := self._get(key)) is None:
                break
            blocks.append(entry)
        return blocks

    def _get(self, key: bytes) -> Tensor | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def _put(self, key: bytes, value: Tensor) -> None:
        with self._lock:
            if value.nbytes > self.max_bytes or key in self._entries:
                return
            self._entries[key] = value
            self.size += value.nbytes
            while self.size > self.max_bytes:
                self.size -= self._entries.popitem(last=False)[1].nbytes


def content_key(before: bytes, content: Tensor) -> bytes:
    """Return the SHA-256 of what came before and of a tensor's bytes."""
    raw = content.detach().contiguous().cpu().flatten().view(torch.uint8)
    head = before + str((content.dtype, tuple(content.shape))).encode()
    return hashlib.sha256(head + raw.numpy().tobytes()).digest()


def _prompt_keys(canvas: Canvas, attention: BlockAttention) -> list[list[bytes]]:
    """Return the key of every whole block of each row's prompt; it covers all blocks before."""
    length, keys = attention.length, []
    for row, size in enumerate(canvas.prompt_lengths.tolist()):
        key, own = b"prompt", []
        for first in range(0, size // length * length, length):
            key = content_key(key, canvas.content[row, first : first + length])
            own.append(key)
        keys.append(own)
    return keys
