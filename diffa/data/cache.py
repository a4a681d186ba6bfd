"""Cache a frozen encoder's features on disk: each recording is encoded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffa.runtime.files import atomic_write, expand, remove_stale_drafts
from diffa.types import Features, FeatureSpec

_KINDS = {"float16": torch.float16, "float32": torch.float32}
_RECOUNT = 256  # files written before the folder's size is taken anew: others write too


class FeatureCache:
    """The states that adapters read, one file per recording.

    The key is the waveform's content, the encoder's weights and the indices of the states, so no
    entry is ever stale. Several processes may share a folder.

    Args:
        folder: where to keep them.
        encoder: a name for the encoder and its weights: see ``identity``.
        layers: indices of the states to keep, counted from 0 (see ``layers_read``).
        total: states that the encoder emits.
        dtype: on disk; float16 halves the room and rounds to three digits.
        gigabytes: the folder's bound; when it is reached nothing more is written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        encoder: str,
        layers: Iterable[int],
        total: int,
        *,
        dtype: Literal["float16", "float32"] = "float16",
        gigabytes: float = 50.0,
    ) -> None:
        self.folder = expand(folder)
        self.layers, self.total = tuple(sorted(set(layers))), total
        self.dtype, self.limit = _KINDS[dtype], int(gigabytes * 2**30)
        self.prefix = f"{encoder}/{dtype}/{','.join(map(str, self.layers))}"
        self.hits = self.misses = self.refused = 0
        for folder in self.folder.glob("*/"):
            remove_stale_drafts(folder)
        self._bytes = self._size()
        self._num_written = 0

    def key(self, wave: Tensor) -> str:
        """Name a recording (S,) under this encoder."""
        digest = hashlib.blake2b(self.prefix.encode(), digest_size=20)
        digest.update(wave.contiguous().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def features(
        self,
        encoder: Callable[[Tensor, Tensor], Features],
        audio: Tensor,
        lengths: Tensor,
    ) -> Features:
        """Return features of audio (B, S): kept ones, and the encoder's for the rest."""
        waves = [row[:n] for row, n in zip(audio, lengths.tolist(), strict=True)]
        keys = [self.key(wave) for wave in waves]
        entries = [self.read(key) for key in keys]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        self.hits += len(entries) - len(missing)
        self.misses += len(missing)
        if missing:
            index = torch.tensor(missing, device=audio.device)
            longest = int(lengths[index].max())
            features = encoder(audio[index, :longest], lengths[index])
            for i, entry in zip(missing, _split(features, self.layers), strict=True):
                self.write(keys[i], entry)
                # Round now as a read from disk would: results must not depend on the cache.
                entries[i] = {k: v.to(self.dtype) if k != "counts" else v for k, v in entry.items()}
        rows = [entry for entry in entries if entry is not None]
        return _joined(rows, self.layers, self.total, audio.device)

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return one recording's states, or None; a damaged file counts as absent."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(self._path(key)))
        except (FileNotFoundError, SafetensorError, OSError):
            return None

    def write(self, key: str, states: dict[str, Tensor]) -> None:
        """Keep one recording's states unless the bound is reached or the disk refuses."""
        from safetensors.torch import save

        entry = {
            name: value.to(self.dtype if name != "counts" else value.dtype).cpu().contiguous()
            for name, value in states.items()
        }
        data = save(entry)
        if self._num_written >= _RECOUNT:
            self._bytes, self._num_written = self._size(), 0
        if self._bytes + len(data) > self.limit:
            self.refused += 1
            return
        try:
            with atomic_write(self._path(key), sync=False) as draft:
                draft.write_bytes(data)
        except OSError:  # a full disk: training goes on without the cache
            self.refused += 1
            return
        self._bytes += len(data)
        self._num_written += 1

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))


def encoder_fingerprint(name: str, encoder: nn.Module) -> str:
    """Return a fingerprint of an encoder: its name in the spec and every weight's bytes."""
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def layers_used_by(adapters: Iterable[Any], source: FeatureSpec) -> tuple[int, ...]:
    """Return which states adapters read, found by running them on a second of zeros."""
    watched = _Watched(source.layers + 1)
    frames = max(8, int(source.rate))
    device = next((p.device for a in adapters for p in a.parameters()), torch.device("cpu"))
    watched.state = torch.zeros(1, frames, source.width, device=device)
    count = torch.tensor([frames], device=device)
    for adapter in adapters:
        training = adapter.training
        with torch.no_grad():
            adapter.eval()(Features(watched, count, count))
        adapter.train(training)
    return tuple(sorted(watched.indices_read))


class _Watched(tuple[Tensor, ...]):
    """A tuple of states that records which of them are read."""

    state: Tensor
    indices_read: set[int]

    def __new__(cls, size: int) -> _Watched:
        watched = super().__new__(cls, [torch.empty(0)] * size)
        watched.indices_read = set()
        return watched

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        indices = places if isinstance(places, range) else [places]
        self.indices_read.update(indices)
        return self.state if isinstance(places, int) else tuple(self.state for _ in indices)

    def __iter__(self) -> Any:
        return iter([self[i] for i in range(len(self))])


def _split(features: Features, layers: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Return each row's kept states, cut to the encoder's extent, and its two counts."""
    rows = []
    for b, (length, extent) in enumerate(
        zip(features.lengths.tolist(), features.extents.tolist(), strict=True)
    ):
        row = {str(i): features.states[i][b, :extent].detach() for i in layers}
        rows.append(row | {"counts": torch.tensor([length, extent])})
    return rows


def _joined(
    rows: list[dict[str, Tensor]], layers: tuple[int, ...], total: int, device: torch.device
) -> Features:
    """Pad rows into features; states that were not kept are empty."""
    counts = torch.stack([row["counts"] for row in rows]).to(device)
    most = int(counts[:, 1].max())
    states = [torch.empty(0, device=device)] * total
    for i in layers:
        padded = [F.pad(row[str(i)].float(), (0, 0, 0, most - len(row[str(i)]))) for row in rows]
        states[i] = torch.stack(padded).to(device)
    return Features(tuple(states), counts[:, 0], counts[:, 1])
