"""The types of a manifest's fields: what every command checks before it uses a row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffa.runtime.text import is_unicode

_TEXTS = (
    "audio_filepath", "input", "target", "transcription", "dataset", "seed_transcript", "chosen",
    "rejected", "speaker", "split",
)  # fmt: skip
_LONGEST_NAME = 255  # bytes of one name in a path
_LONGEST_PATH = 4096  # bytes


def field_fault(row: Any) -> str:
    """Return what is wrong with the fields of a row, whatever they are used for; nothing: "".

    Fields may be missing or null. Texts have to be Unicode, durations finite numbers, and names of
    files such as the system can hold.
    """
    if not isinstance(row, dict):
        return f"is {type(row).__name__}, not a mapping"
    for name in _TEXTS:
        if row.get(name) is not None and not isinstance(row[name], str):
            return f"has a {name} that is not text but {type(row[name]).__name__}"
    for name, text in _all_texts(row):
        if not is_unicode(text):
            return f"has a {name} that is no valid Unicode (a lone surrogate): {text[:60]!r}"
    if fault := path_fault(row.get("audio_filepath") or ""):
        return fault
    duration = row.get("duration")
    if duration is not None and not _is_duration(duration):
        return f"has a duration that is no number of seconds: {str(duration)[:60]!r}"
    return ""


def path_fault(name: str) -> str:
    """Return why the system takes no file of this name; nothing: ""."""
    excerpt = name if len(name) <= 80 else f"{name[:77]}..."
    if "\0" in name:
        return f"has an audio_filepath with a NUL character: {excerpt!r}"
    if len(name.encode()) > _LONGEST_PATH or any(
        len(part.encode()) > _LONGEST_NAME for part in name.split("/")
    ):
        return f"has an audio_filepath that is too long: {excerpt!r}"
    if name.startswith("~"):
        try:
            Path(name).expanduser()
        except RuntimeError:
            return f"has an audio_filepath of an unknown user: {excerpt!r}"
    return ""


def _is_duration(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:  # an integer of hundreds of digits
        return False


def _all_texts(value: Any, name: str = "field") -> Iterator[tuple[str, str]]:
    """Yield every text in a JSON value, keys included, with the field that holds it."""
    stack = [(name, value)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield "name", str(key)
                stack.append((str(key), inner))
        elif isinstance(value, list | tuple):
            stack.extend((name, inner) for inner in value)
