"""Count samples and hours per dataset, as DIFFA's Table 1 does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from diffa.data.samples import ManifestRow

TOTAL = "total"


class DatasetStatistics(NamedTuple):
    """The counts of one dataset.

    Attributes:
        dataset: its name, or ``total``.
        rows: questions with answers.
        clips: different recordings.
        speakers: that rows name; 0 where none do.
        hours: of all rows, as the paper counts (a recording asked about twice counts twice).
        seconds: mean duration of a row.
        words: mean length of an answer.
        attributes: what rows know, most frequent first.
    """

    dataset: str
    rows: int
    clips: int
    speakers: int
    hours: float
    seconds: float
    words: float
    attributes: tuple[str, ...]


def corpus_statistics(rows: Sequence[ManifestRow]) -> list[DatasetStatistics]:
    """Count rows by dataset, in order of appearance, and all together."""
    names = dict.fromkeys(str(row.get("dataset") or "unnamed") for row in rows)
    groups = {
        name: [row for row in rows if str(row.get("dataset") or "unnamed") == name]
        for name in names
    }
    return [_count_dataset(name, group) for name, group in groups.items()] + [
        _count_dataset(TOTAL, rows)
    ]


def _count_dataset(name: str, rows: Sequence[ManifestRow]) -> DatasetStatistics:
    seconds = sum(_seconds(row) for row in rows)
    speakers = {(row.get("dataset"), row["speaker"]) for row in rows if row.get("speaker")}
    known = Counter(key for row in rows for key in row.get("attributes") or ())
    words = sum(len(str(row.get("target") or "").split()) for row in rows)
    return DatasetStatistics(
        name,
        len(rows),
        len({row.get("audio_filepath") for row in rows}),
        len(speakers),
        round(seconds / 3600, 2),
        round(seconds / max(len(rows), 1), 2),
        round(words / max(len(rows), 1), 1),
        tuple(key for key, _ in known.most_common()),
    )


def _seconds(row: ManifestRow) -> float:
    duration = row.get("duration")
    return float(duration) if isinstance(duration, int | float) else 0.0


def attribute_counts(rows: Sequence[ManifestRow]) -> dict[str, dict[str, int]]:
    """Count the values of every attribute that has few of them, most frequent first."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in (row.get("attributes") or {}).items():
            if name not in ("text", "duration"):
                counts.setdefault(name, Counter())[value] += 1
    return {name: dict(count.most_common()) for name, count in counts.items()}
