"""Check every row of a manifest before training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from diffa.data.formats import MANIFEST_FIELDS, numbered_rows
from diffa.data.manifest import probe_audio
from diffa.data.samples import DataError, Fault
from diffa.data.synthesis.captions import answer_fault

ENCODER_SECONDS = 30.0
"""Seconds that DIFFA's encoder hears; the rest of a longer recording is cut."""

_TOLERANCE = 0.1  # seconds between what a row says and what its file holds


class ManifestReport(NamedTuple):
    """The unusable and the suspicious rows of a manifest.

    Attributes:
        rows: in the file, faulty ones included.
        faults: rows that training cannot use.
        warnings: rows that it can, but that probably are not what they should be.
    """

    rows: int
    faults: list[Fault]
    warnings: list[Fault]


def validate_manifest(path: str | os.PathLike[str], *, listen: bool = True) -> ManifestReport:
    """Check every row of a manifest (.json, .jsonl, .parquet; published or ``messages`` form).

    Args:
        listen: decode every recording, to compare durations and find broken files.

    Raises:
        DataError: the file as a whole cannot be read, or holds no row.
    """
    count, faults, warnings = 0, list[Fault](), list[Fault]()
    first_rows: dict[tuple[str, ...], int] = {}
    named: dict[str, int] = {}
    for number, row in numbered_rows(path):
        count += 1
        if isinstance(row, Fault):
            faults.append(row)
            continue
        wrong, odd = _check_fields(row)
        seconds = 0.0
        if not wrong:
            wrong, seconds = _check_recording(Path(row["audio_filepath"]), listen)
            odd += _check_duration(row, seconds)
        identity = tuple(str(row.get(k)) for k in ("audio_id", "audio_filepath", "input", "target"))
        if not wrong and identity in first_rows:
            wrong = f"repeats row {first_rows[identity]}"
        first_rows.setdefault(identity, number)
        audio_id = row.get("audio_id")
        if audio_id is not None and named.setdefault(str(audio_id), number) != number:
            odd.append(
                f"has the audio_id of row {named[str(audio_id)]}: "
                "recipes need unique: false for that"
            )
        faults += [Fault(number, wrong)] if wrong else []
        warnings += [Fault(number, reason) for reason in odd] if not wrong else []
    if not count:
        raise DataError(f"{path} holds no row")
    return ManifestReport(count, faults, warnings)


def _check_fields(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Return why a row's fields cannot be used, and what is odd about them."""
    for name in ("audio_filepath", "input", "target"):
        if not isinstance(row.get(name, ""), str):
            return f"has a {name} that is not text", []
    if not row.get("audio_filepath"):
        return "has no audio_filepath", []
    if not row.get("target", "").strip():
        return "has no answer (target)", []
    if "rejected" in row:
        reason = _check_preference(row)
        if reason:
            return reason, []
    absent = [name for name in MANIFEST_FIELDS if name not in row]
    odd = [f"has no {', '.join(absent)}"] if absent else []
    if not row.get("input", "").strip():
        odd.append("has no question (input)")
    if reason := answer_fault(row["target"]):
        odd.append(f"has an answer that {reason}")
    return "", odd


def _check_preference(row: dict[str, Any]) -> str:
    rejected, preferred = row["rejected"], row.get("chosen", row["target"])
    if not isinstance(rejected, str) or not rejected.strip():
        return "has no rejected answer"
    if rejected.strip() == row["target"].strip():
        return "rejects the answer that it chooses"
    # DIFFA-2's loader takes target, whatever chosen says
    return "has a chosen answer that is not its target" if preferred != row["target"] else ""


def _check_recording(path: Path, listen: bool) -> tuple[str, float]:
    if not path.is_file():
        return f"audio file {path} is missing", 0.0
    return probe_audio(path, decode=True) if listen else ("", 0.0)


def _check_duration(row: dict[str, Any], seconds: float) -> list[str]:
    odd: list[str] = []
    duration = row.get("duration")
    if "duration" in row and not (isinstance(duration, int | float) and duration > 0):
        odd.append(f"has the duration {duration!r}")
    elif seconds and duration is not None and abs(seconds - float(duration)) > _TOLERANCE:
        odd.append(f"says {float(duration):.2f} s, but its file holds {seconds:.2f} s")
    longest = max(seconds, float(duration) if isinstance(duration, int | float) else 0.0)
    if longest > ENCODER_SECONDS:
        odd.append(
            f"is {longest:.1f} s long; encoders of one Whisper window hear {ENCODER_SECONDS:g}"
        )
    return odd
