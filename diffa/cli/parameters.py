"""Count what a spec builds, without loading its weights."""

from __future__ import annotations

from typing import Any

_SECONDS = 30


def count(spec: Any) -> list[dict[str, Any]]:
    """Build a spec on the meta device and describe every part with weights, and their sum."""
    import diffa

    model: Any = diffa.build(spec, device="meta")
    learns = spec.resolve().data["train"]
    source = model.encoder.out
    rows = [_row("encoder", model.encoder, learns, source.width, _rate(source.rate))]
    for key, adapter in model.adapters.items():
        rate = _adapter_rate(adapter, source.rate)
        rows.append(_row(f"adapters.{key}", adapter, learns, model.backbone.width, rate))
    rows.append(_row("backbone", model.backbone, learns, model.backbone.width, ""))
    total = {"part": "sum", "class": "", "width": None, "rate": ""}
    for column in ("parameters", "trained"):
        total[column] = sum(row[column] for row in rows)
    order = list(rows[0])
    return [*rows, {column: total[column] for column in order}]


def _row(path: str, part: Any, learns: list[str], width: int, rate: str) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in part.parameters())
    trained = path in learns or path.partition(".")[0] in learns
    return {
        "part": path,
        "class": type(part).__name__,
        "parameters": parameters,
        "trained": parameters if trained else 0,
        "width": width,
        "rate": rate,
    }


def _adapter_rate(adapter: Any, frames: float) -> str:
    """Embeddings per second, or how many there are where the audio's length does not matter."""
    import torch

    lengths = torch.tensor([round(frames * _SECONDS), round(frames * _SECONDS * 2)], device="cpu")
    short, long = (int(length) for length in adapter.out_lengths(lengths))
    return f"{short} in all" if short == long else _rate(short / _SECONDS)


def _rate(rate: float) -> str:
    return f"{rate:g}/s"
