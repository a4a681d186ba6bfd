"""Parameter counts of a spec's parts, without loading weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.spec.spec import Spec

_SECONDS = 30


def count_parameters(spec: Spec) -> list[dict[str, Any]]:
    """Build a spec on the meta device; return one row per part with weights, and their sum."""
    import diffa

    model: Model = diffa.build(spec, device="meta")
    trained = spec.resolve().data["train"]
    source: Any = model.encoder.out
    width = model.backbone.width
    rows = [_row("encoder", model.encoder, trained, source.width, _rate(source.rate))]
    for key, adapter in model.adapters.items():
        rate = _adapter_rate(adapter, source.rate)
        rows.append(_row(f"adapters.{key}", adapter, trained, width, rate))
    rows.append(_row("backbone", model.backbone, trained, width, ""))
    total: dict[str, Any] = dict.fromkeys(rows[0]) | {"class": "", "rate": ""}
    sums = {column: sum(row[column] for row in rows) for column in ("parameters", "trained")}
    return [*rows, total | {"part": "sum"} | sums]


def _row(path: str, part: Any, trained: list[str], width: int, rate: str) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in part.parameters())
    learns = path in trained or path.partition(".")[0] in trained
    return {
        "part": path,
        "class": type(part).__name__,
        "parameters": parameters,
        "trained": parameters if learns else 0,
        "width": width,
        "rate": rate,
    }


def _adapter_rate(adapter: Any, frames: float) -> str:
    """Embeddings per second, or their total for adapters whose output has a fixed length."""
    import torch

    lengths = torch.tensor([round(frames * _SECONDS), round(frames * _SECONDS * 2)], device="cpu")
    short, long = (int(length) for length in adapter.out_lengths(lengths))
    return f"{short} in all" if short == long else _rate(short / _SECONDS)


def _rate(rate: float) -> str:
    return f"{rate:g}/s"
