"""Read Whisper's weights in CTranslate2's binary form under the names of transformers.

The file (version 6) is little-endian: version, name of the model, revision, number of variables;
then for each variable its name, rank, shape, dtype, size in bytes and data; then aliases. Names
are written with their length and a zero byte. Queries, keys and values are fused, and keys have a
bias of zeros, which Whisper does not have.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from diffa.errors import CheckpointError

VERSION = 6
_DTYPES = (
    torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16,
)  # fmt: skip
_FIELDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
_OUTER = {
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings/weight": "embed_tokens.weight",
}
_INNER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_FUSED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}


def read_variables(data: bytes) -> dict[str, Tensor]:
    """Return the variables of a CTranslate2 file by name.

    Raises:
        CheckpointError: The data is of another version, or cut short.
    """
    reader = _Reader(data)
    try:
        version = reader.number("I")
        if version != VERSION:
            raise CheckpointError(f"a CTranslate2 file of version {version}; this is for {VERSION}")
        reader.text()  # the model's name
        reader.number("I")
        return dict(reader.variable() for _ in range(reader.number("I")))
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"a CTranslate2 file is damaged: {error}") from error


class _Reader:
    """A position in the data, and what is read from it."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def number(self, kind: str) -> int:
        value: int = struct.unpack_from(f"<{kind}", self._data, self._at)[0]
        self._at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        return bytes(self._take(self.number("H"))).rstrip(b"\0").decode()

    def variable(self) -> tuple[str, Tensor]:
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = _DTYPES[self.number("B")]
        raw = self._take(self.number("I"))
        values = torch.frombuffer(bytearray(raw), dtype=dtype) if len(raw) else torch.empty(0)
        return name, values.reshape(shape)

    def _take(self, count: int) -> memoryview:
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise ValueError("it ends too early")
        self._at += count
        return part


def rename_whisper(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Whisper's variables under the names of transformers, fused ones apart."""
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        if not value.is_floating_point() or value.dim() == 0:
            continue  # constants of the runtime
        side, _, rest = name.partition("/")
        layer = re.fullmatch(r"layer_(\d+)/(.+)/(\w+)", rest)
        if layer is None:
            state[f"model.{side}.{_outer_name(rest)}"] = value
            continue
        prefix, inner, field = f"model.{side}.layers.{layer[1]}", layer[2], _FIELDS[layer[3]]
        if inner not in _FUSED:
            state[f"{prefix}.{_INNER[inner]}.{field}"] = value
            continue
        parts = _FUSED[inner]
        for part, own in zip(parts, value.chunk(len(parts)), strict=True):
            if not (field == "bias" and part.endswith("k_proj")):
                state[f"{prefix}.{part}.{field}"] = own.clone()
    return state


def _outer_name(rest: str) -> str:
    if rest in _OUTER:
        return _OUTER[rest]
    module, _, field = rest.rpartition("/")
    return f"{module}.{_FIELDS[field]}"
