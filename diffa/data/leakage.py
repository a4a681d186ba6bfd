"""Find samples that two splits share, and duplicates in one split."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffa.data.samples import ManifestRow
from diffa.errors import describe_error

SAME_SOUND = 0.99
"""Cosine of two fingerprints from which recordings count as copies of each other. On FSDD copies at
another level, rate or coding reach 0.995 or more, different recordings 0.98 or less."""


class SharedItem(NamedTuple):
    """Something that occurs in both of two splits, or twice in one.

    Attributes:
        kind: ``id``, ``audio`` (the same samples), ``sound`` (a copy at another level, rate or
            coding), ``speaker``, ``text`` or ``question`` (the same transcript and question).
        what: the value, or the two files.
        left, right: numbers of the rows (from 1), at most five of each.
    """

    kind: str
    what: str
    left: tuple[int, ...]
    right: tuple[int, ...]


class LeakReport(NamedTuple):
    """The shared samples, and notes on what could not be compared."""

    shared: list[SharedItem]
    notes: list[str]


def compare_splits(
    left: Sequence[ManifestRow],
    right: Sequence[ManifestRow],
    *,
    listen: bool = True,
    near: bool = False,
) -> LeakReport:
    """Find what two splits share: ids, audio, speakers, texts and questions.

    Args:
        listen: decode every recording and compare samples.
        near: also compare how recordings sound, which finds re-coded and louder copies.
    """
    notes: list[str] = []
    shared: list[SharedItem] = []
    for kind, key in KEYS.items():
        if kind == "speaker" and not all(any(map(key, rows)) for rows in (left, right)):
            notes.append("speakers were not compared: a split names none (published JSON does not)")
        shared += _intersect(kind, _group(left, key), _group(right, key))
    if listen:
        both = [_grouped_audio(rows, notes) for rows in (left, right)]
        shared += _intersect("audio", *both)
    if near:
        shared += _similar(left, right, notes)
    return LeakReport(shared, notes)


def find_duplicates(rows: Sequence[ManifestRow], *, listen: bool = True) -> LeakReport:
    """Find duplicates in one split: ids, whole rows, and files with equal samples."""
    notes: list[str] = []
    groups = [("id", _group(rows, _row_key)), ("question", _group(rows, _question_row_key))]
    if listen:
        digests = _grouped_audio(rows, notes)
        files = {
            key: [rows[n - 1]["audio_filepath"] for n in numbers]
            for key, numbers in digests.items()
        }
        groups.append(("audio", {key: digests[key] for key in digests if len(set(files[key])) > 1}))
    shared = [
        SharedItem(kind, what, tuple(numbers[:1]), tuple(numbers[1:6]))
        for kind, group in groups
        for what, numbers in group.items()
        if len(numbers) > 1
    ]
    return LeakReport(shared, notes)


def _row_key(row: ManifestRow) -> str:
    """Name a row: one recording may be asked about several times under one id."""
    return f"{row['audio_id']} {row.get('input', '')}".strip() if row.get("audio_id") else ""


def _id_key(row: ManifestRow) -> str:
    return f"{row.get('dataset', '')}/{row['audio_id']}" if row.get("audio_id") else ""


def _speaker_key(row: ManifestRow) -> str:
    return f"{row.get('dataset', '')}/{row['speaker']}" if row.get("speaker") else ""


def _text_key(row: ManifestRow) -> str:
    """Return a transcript without case and punctuation, if it has more than three words."""
    words = re.findall(r"\w+", str(row.get("transcription") or "").lower())
    return " ".join(words) if len(words) > 3 else ""


def _question_row_key(row: ManifestRow) -> str:
    return "\n".join(str(row.get(name) or "") for name in ("audio_filepath", "input", "target"))


def _question_key(row: ManifestRow) -> str:
    text = _text_key(row)
    return f"{text} | {row.get('input', '')}" if text else ""


KEYS: dict[str, Callable[[ManifestRow], str]] = {
    "id": _id_key,
    "speaker": _speaker_key,
    "text": _text_key,
    "question": _question_key,
}


def _group(rows: Sequence[ManifestRow], key: Callable[[ManifestRow], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows, start=1):
        name = key(row)
        if name:
            groups[name].append(number)
    return groups


def _intersect(
    kind: str, left: dict[str, list[int]], right: dict[str, list[int]]
) -> list[SharedItem]:
    both = sorted(left.keys() & right.keys())
    return [SharedItem(kind, name, tuple(left[name][:5]), tuple(right[name][:5])) for name in both]


def _files(rows: Iterable[ManifestRow]) -> list[str]:
    return list(dict.fromkeys(row["audio_filepath"] for row in rows if row.get("audio_filepath")))


def _grouped_audio(rows: Sequence[ManifestRow], notes: list[str]) -> dict[str, list[int]]:
    """ManifestRow numbers by a digest of the decoded samples."""
    from diffa.audio import read

    digests: dict[str, str] = {}
    for name in _files(rows):
        try:
            wave, _ = read(name)
        except Exception as error:  # of one recording: the others are compared
            notes.append(f"not compared: {describe_error(error)}")
            continue
        whole = (wave.clamp(-1, 1) * 32767).round().short().numpy().tobytes()
        digests[name] = hashlib.blake2b(whole, digest_size=12).hexdigest()
    return _group(rows, lambda row: digests.get(row.get("audio_filepath", ""), ""))


def fingerprint(path: str | Path) -> NDArray[np.float32]:
    """Describe how a recording sounds whatever its level: 48 times by 24 bands, of length one.

    Raises:
        AudioError: it cannot be read.
    """
    from diffa.audio import prepare

    wave = prepare(path, 16_000).numpy().astype(np.float64)
    width = 512
    wave = np.pad(wave, (0, max(width * 2 - len(wave), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(wave, width)[:: width // 2]
    power = np.abs(np.fft.rfft(frames * np.hanning(width), axis=1)) ** 2
    edges = np.unique(np.geomspace(3, 110, 25).round().astype(int))  # 94 to 3,400 Hz: any codec
    bands = np.stack([power[:, a:b].sum(1) for a, b in pairwise(edges)], axis=1)
    levels = np.log(bands + 1e-5 * bands.max() + 1e-12)  # 50 dB below the top: noise of codings
    at = np.linspace(0, len(levels) - 1, 48)
    below, rest = at.astype(int), (at % 1)[:, None]
    above = np.minimum(below + 1, len(levels) - 1)
    fixed = levels[below] * (1 - rest) + levels[above] * rest
    fixed -= fixed.mean()
    return np.asarray((fixed / (np.linalg.norm(fixed) + 1e-12)).ravel(), dtype=np.float32)


def _similar(
    left: Sequence[ManifestRow], right: Sequence[ManifestRow], notes: list[str]
) -> list[SharedItem]:
    """Pairs of files whose fingerprints nearly agree, a block of rows at a time."""
    sides = [_fingerprints(rows, notes) for rows in (left, right)]
    if not all(names for names, _ in sides):
        return []
    (names, prints), (others, against) = sides
    rows = [_group(side, lambda row: row.get("audio_filepath", "")) for side in (left, right)]
    shared = []
    for first in range(0, len(names), 1024):
        close = np.argwhere(prints[first : first + 1024] @ against.T >= SAME_SOUND)
        for i, j in close.tolist():
            pair = (names[first + i], others[j])
            numbers = [tuple(rows[side][pair[side]][:5]) for side in (0, 1)]
            shared.append(SharedItem("sound", " ~ ".join(pair), numbers[0], numbers[1]))
    return shared


def _fingerprints(
    rows: Sequence[ManifestRow], notes: list[str]
) -> tuple[list[str], NDArray[np.float32]]:
    names, vectors = [], []
    for name in _files(rows):
        try:
            vectors.append(fingerprint(name))
        except Exception as error:  # of one recording: the others are compared
            notes.append(f"not compared: {describe_error(error)}")
        else:
            names.append(name)
    return names, np.stack(vectors) if vectors else np.zeros((0, 1), dtype=np.float32)
