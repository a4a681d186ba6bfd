"""Transcripts of recordings of any length: cut, answered in batches, joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from diffa.audio.segments import Segment, cut_at_silences

if TYPE_CHECKING:
    from diffa.model import Model

_LONGEST_REPEAT = 12  # words of an overlap that two segments may both hold


class TranscriptSegment(NamedTuple):
    """A part of a transcript.

    Attributes:
        start: Second at which it begins.
        end: Second at which it ends.
        text: What is said.
        confidence: Mean log-probability of its tokens.
    """

    start: float
    end: float
    text: str
    confidence: float


class Transcript(NamedTuple):
    """The transcript of a recording. It prints as its text.

    Attributes:
        text: All of it.
        segments: Its parts with their times; empty for a silent recording.
        confidence: Mean log-probability over the segments, weighted by their seconds.
        num_forwards: Forward passes of the backbone.
    """

    text: str
    segments: list[TranscriptSegment]
    confidence: float
    num_forwards: int

    def __str__(self) -> str:
        return self.text


def transcribe(
    model: Model,
    waveform: Tensor,
    instruction: str,
    *,
    max_seconds: float,
    batch_size: int,
    max_tokens: int | None,
) -> Transcript:
    """Return the transcript of a waveform (S,) at the encoder's rate."""
    rate = model.encoder.sample_rate
    parts = cut_at_silences(waveform, rate, max_seconds=max_seconds)
    segments: list[TranscriptSegment] = []
    num_forwards = 0
    for start in range(0, len(parts), batch_size):
        batch = parts[start : start + batch_size]
        answer = model.answer(
            [waveform[part.start : part.end] for part in batch],
            [instruction] * len(batch),
            sample_rate=rate,
            max_tokens=max_tokens,
        )
        num_forwards += answer.num_forwards
        segments += [
            TranscriptSegment(part.start / rate, part.end / rate, text.strip(), confidence)
            for part, text, confidence in zip(batch, answer.text, answer.confidence, strict=True)
        ]
    segments = _without_repeats(segments, parts)
    total = sum(segment.end - segment.start for segment in segments)
    confidence = sum(s.confidence * (s.end - s.start) for s in segments) / total if total else 0.0
    text = " ".join(segment.text for segment in segments if segment.text)
    return Transcript(text, segments, confidence, num_forwards)


def _without_repeats(
    segments: Sequence[TranscriptSegment], parts: Sequence[Segment]
) -> list[TranscriptSegment]:
    """Remove words that a segment repeats from an overlap with the one before it."""
    joined: list[TranscriptSegment] = []
    for segment, part in zip(segments, parts, strict=True):
        if part.overlaps and joined:
            words, before = segment.text.split(), joined[-1].text.split()
            count = _repeated(before, words)
            middle = (joined[-1].end + segment.start) / 2
            joined[-1] = joined[-1]._replace(end=middle)
            segment = segment._replace(start=middle, text=" ".join(words[count:]))
        joined.append(segment)
    return joined


def _repeated(before: Sequence[str], words: Sequence[str]) -> int:
    """Return how many first ``words`` are the last words ``before``, case and points aside."""
    plain = [[re.sub(r"\W", "", word).lower() for word in side] for side in (before, words)]
    for count in range(min(len(before), len(words), _LONGEST_REPEAT), 0, -1):
        if plain[0][-count:] == plain[1][:count]:
            return count
    return 0


def to_srt(segments: Iterable[TranscriptSegment]) -> str:
    """Return segments as SubRip subtitles."""
    audible = [segment for segment in segments if segment.text]
    return "\n".join(
        f"{number}\n{_clock(s.start, ',')} --> {_clock(s.end, ',')}\n{s.text}\n"
        for number, s in enumerate(audible, 1)
    )


def to_vtt(segments: Iterable[TranscriptSegment]) -> str:
    """Return segments as WebVTT subtitles."""
    return "WEBVTT\n" + "".join(
        f"\n{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n{_escape(s.text)}\n"
        for s in segments
        if s.text
    )


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
