"""Recordings become embeddings once: newcomers in batches, those heard before from memory."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffa.audio import pad
from diffa.canvas.batch import unpad_embeds

TOGETHER = 8  # recordings that the encoder hears at once: longer batches make others wait


class Ears:
    """A model's ``listen`` with a memory of recent recordings; any number of threads may use it.

    Args:
        model: what listens.
        room: embeddings that are remembered, of all recordings together; 0 for none.
    """

    def __init__(self, model: Any, room: int) -> None:
        self._model, self._room, self._used = model, room, 0
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, waves: Sequence[Tensor]) -> list[Tensor | Exception]:
        """Embeddings (N, W) of each waveform (S,), or what went wrong with it."""
        keys = [key(wave) for wave in waves]
        found: dict[bytes, Tensor | Exception] = {}
        with self._lock:
            for name in keys:
                if name in self._known:
                    self._known.move_to_end(name)
                    found[name] = self._known[name]
        new = {name: wave for name, wave in zip(keys, waves, strict=True) if name not in found}
        order = sorted(new, key=lambda name: len(new[name]))  # alike in length: little padding
        for start in range(0, len(order), TOGETHER):
            names = order[start : start + TOGETHER]
            heard = self._listen([new[name] for name in names])
            found.update(zip(names, heard, strict=True))
        with self._lock:
            for name in order:
                self._remember(name, found[name])
        return [found[name] for name in keys]

    def _listen(self, waves: Sequence[Tensor]) -> Sequence[Tensor | Exception]:
        """Hear a batch; where that fails, each by itself."""
        try:
            return unpad_embeds(self._model.listen(*pad(waves)))
        except Exception as error:
            if len(waves) == 1:
                return [error]
            return [self._listen([wave])[0] for wave in waves]

    def _remember(self, name: bytes, heard: Tensor | Exception) -> None:
        """Keep embeddings, and forget what was used longest ago where there is no room."""
        if isinstance(heard, Exception) or len(heard) > self._room or name in self._known:
            return
        self._known[name] = heard.clone()  # a view would keep its whole batch
        self._used += len(heard)
        while self._used > self._room:
            self._used -= len(self._known.popitem(last=False)[1])


def key(wave: Tensor) -> bytes:
    """Equal for equal waveforms."""
    return hashlib.sha256(wave.numpy(force=True).tobytes()).digest()
