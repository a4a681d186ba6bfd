"""Answers of changing length on a canvas of fixed size: slots that are not used are absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


def resize(canvas: Canvas, ours: Tensor, size: Tensor) -> None:
    """Use the first ``size`` (B,) answer slots of each row; the others are absent, and EOS."""
    answer = slice(canvas.start, canvas.start + canvas.length)
    index = torch.arange(canvas.size, device=size.device) - canvas.start
    used = (index >= 0) & (index < size[:, None])
    unused = (index >= size[:, None]) & (index < canvas.length)
    new = used & ~canvas.valid
    canvas.hide(unused)
    canvas.show(used)
    canvas.fill(new[:, answer] & ours, canvas.vocab.mask or 0)
    canvas.fill(unused[:, answer], canvas.vocab.eos)


def insert(canvas: Canvas, ours: Tensor, size: Tensor, spot: Tensor, count: int) -> Tensor:
    """Put ``count`` masks behind the place ``spot`` (B,) and move the rest; return new sizes."""
    places = torch.arange(canvas.length, device=size.device)
    inside = places < size[:, None]
    ended = ((canvas.answer == canvas.vocab.eos) & inside).any(dim=1)
    able = ours.all(dim=1) & ~ended & (spot < size) & (size + count <= canvas.length)
    at = torch.where(able, spot, canvas.length)[:, None]
    source = torch.where(places <= at, places, places - count)
    added = (places > at) & (places <= at + count)
    tokens = canvas.answer.gather(1, source.clamp(min=0))
    tokens = tokens.masked_fill(added, canvas.vocab.mask or 0)
    confidence = canvas.confidence.gather(1, source.clamp(min=0)).masked_fill(added, 0.0)
    slots = torch.where(able[:, None] & inside, places + canvas.start, -1)
    size = torch.where(able, size + count, size)
    resize(canvas, ours, size)
    slots = torch.where(able[:, None] & (places < size[:, None]), places + canvas.start, -1)
    canvas.write(slots, tokens, confidence)
    return size
