"""Cut long recordings at silences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffa.errors import SpecError

_FRAME = 0.02  # seconds over which loudness is measured
_PAUSE = 0.2  # seconds that must be quiet to count as a pause
_RANGE = 40.0  # dB below the loudest tenth: silence, whatever the noise
_MARGIN = 8.0  # dB above the noise: speech
_DROP = 10.0  # dB below the loudest tenth: what is louder is no pause
_LATEST = 0.5  # share of a segment before which it is not cut
_KEEP = 0.1  # seconds of silence that stay beside speech


class Segment(NamedTuple):
    """A part of a recording, in samples.

    Attributes:
        start: First sample.
        end: Sample after the last.
        overlaps: Whether it begins before the end of the segment before it: nothing was quiet
            enough to cut there.
    """

    start: int
    end: int
    overlaps: bool = False


def cut_at_silences(
    waveform: Tensor, rate: int, *, max_seconds: float, overlap_seconds: float = 1.0
) -> list[Segment]:
    """Divide a waveform (S,) into segments of at most ``max_seconds``; silent parts are left out.

    A segment ends at the longest pause of its second half. Where there is none, it ends at its
    limit, and the next one begins ``overlap_seconds`` earlier.

    Raises:
        SpecError: ``max_seconds`` is below 1.
    """
    if not max_seconds >= 1:
        raise SpecError(f"max_seconds must be at least 1, got {max_seconds}")
    if not len(waveform):
        return []
    size = max(1, round(_FRAME * rate))
    quiet = _quiet_frames(waveform, size)
    longest, pause = int(max_seconds / _FRAME), max(1, round(_PAUSE / _FRAME))
    overlap = min(int(overlap_seconds / _FRAME), longest // 4)
    speech = (~quiet).nonzero()[:, 0]
    segments: list[Segment] = []
    start, last, overlaps = 0, len(quiet), False
    if len(speech):
        last = min(last, int(speech[-1]) + 1 + round(_KEEP / _FRAME))
    while True:
        ahead = speech[speech >= start]
        if not len(ahead):
            return segments
        if not overlaps:
            start = max(start, int(ahead[0]) - round(_KEEP / _FRAME))
        end = min(start + longest, last)
        cut, is_pause = end, end == last
        if end < last:
            first = start + int(longest * _LATEST)
            middle = _longest_run(quiet[first:end], pause)
            if middle is not None:
                cut, is_pause = first + middle, True
        samples = Segment(start * size, min(cut * size, len(waveform)), overlaps)
        if bool((~quiet[start:cut]).any()):
            segments.append(samples)
        if cut >= last:
            return segments
        overlaps = not is_pause
        start = cut if is_pause else cut - overlap


def _quiet_frames(waveform: Tensor, size: int) -> Tensor:
    """Return which frames of ``size`` samples are silence, (T,) bool."""
    padded = torch.nn.functional.pad(waveform, (0, -len(waveform) % size))
    level = 10 * padded.view(-1, size).square().mean(dim=1).clamp(min=1e-12).log10()
    noise, loud = level.quantile(0.1), level.quantile(0.9)
    # Speech without pauses has no noise to measure: a pause is quieter than it in any case.
    limit = torch.minimum(noise + _MARGIN, loud - _DROP)
    return (level < limit.clamp(min=float(loud) - _RANGE)) | (level < -80)


def _longest_run(quiet: Tensor, shortest: int) -> int | None:
    """Return the middle of the longest run of quiet frames, None if all are too short."""
    best, where, begin = shortest - 1, None, -1
    for index, value in enumerate([*quiet.tolist(), False]):
        if value and begin < 0:
            begin = index
        elif not value and begin >= 0:
            if index - begin > best:
                best, where = index - begin, (begin + index) // 2
            begin = -1
    return where
