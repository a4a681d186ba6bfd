"""Answers of changing length on a canvas of fixed size: unused slots are hidden and hold EOS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


def resize_answers(canvas: Canvas, writable: Tensor, length: Tensor) -> None:
    """Use the first ``length`` (B,) answer slots of each row; new ``writable`` ones are masks."""
    answer = slice(canvas.start, canvas.start + canvas.length)
    place = torch.arange(canvas.size, device=length.device) - canvas.start
    used = (place >= 0) & (place < length[:, None])
    unused = (place >= length[:, None]) & (place < canvas.length)
    new = used & ~canvas.valid
    canvas.hide(unused)
    canvas.show(used)
    canvas.fill(new[:, answer] & writable, canvas.vocab.mask or 0)
    canvas.fill(unused[:, answer], canvas.vocab.eos)


def insert_masks(
    canvas: Canvas, writable: Tensor, length: Tensor, place: Tensor, count: int
) -> Tensor:
    """Insert ``count`` masks after ``place`` (B,) and shift the rest; return the new lengths.

    ::

        a b . c .      before, place = 2, count = 2, a dot is a mask
        a b . . . c .  after

    Rows with a draft or an EOS, or without room, stay as they are.
    """
    places = torch.arange(canvas.length, device=length.device)
    inside = places < length[:, None]
    ended = ((canvas.answer == canvas.vocab.eos) & inside).any(dim=1)
    can_insert = writable.all(dim=1) & ~ended & (place < length) & (length + count <= canvas.length)
    at = torch.where(can_insert, place, canvas.length)[:, None]
    source = torch.where(places <= at, places, places - count).clamp(min=0)
    inserted = (places > at) & (places <= at + count)
    tokens = canvas.answer.gather(1, source).masked_fill(inserted, canvas.vocab.mask or 0)
    confidence = canvas.confidence.gather(1, source).masked_fill(inserted, 0.0)
    length = torch.where(can_insert, length + count, length)
    resize_answers(canvas, writable, length)
    changed = can_insert[:, None] & (places < length[:, None])
    canvas.write(torch.where(changed, places + canvas.start, -1), tokens, confidence)
    return length
