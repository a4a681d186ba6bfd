"""The errors that a user of diffa can cause; a message says what, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_ADDRESS = re.compile(r"(?: object)? at 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{6,}")
INT_LIMIT = 2**63  # of torch's integers
_LONGEST = 200  # characters of a value in a message


class DiffaError(Exception):
    """Base of every error that a user of diffa can cause and correct."""

    def __str__(self) -> str:
        return _ADDRESS.sub("", super().__str__())


class SpecError(DiffaError):
    """A spec, a question or an option asks for something that does not exist or does not fit."""


class PluginError(DiffaError):
    """A part cannot be found or imported, or breaks the contract of its kind."""


class CheckpointError(DiffaError):
    """Published or saved weights are missing, unreadable, or do not fit the part."""


class AudioError(DiffaError):
    """A recording is missing, unreadable, empty, not finite, or too long for the context."""


class DecodingError(DiffaError):
    """Decoding gives no answer: numbers that are not finite, or a sampler that does not end."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known names close to ``word``, else all of them."""
    names, word = sorted(known), word[:_LONGEST]
    if not names:
        return "; there is none"
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return ", did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "; known: " + ", ".join(names)


def show(value: Any) -> str:
    """Return a value as a message quotes it: at most 200 characters, whatever its size or depth."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of over 4,300 digits; values in themselves
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def describe(error: BaseException) -> str:
    """Return what an exception means to a user, for exceptions that are no DiffaError, too."""
    text = _ADDRESS.sub("", str(error).partition("\nException raised from")[0]).strip()
    match error:
        case DiffaError():
            return text
        case RecursionError():
            return "the input is nested too deeply, or holds itself"
        case MemoryError():
            return f"memory is exhausted{text and f' ({text})'}: use a smaller input or batch"
        case RuntimeError() if is_out_of_memory(error):
            return f"memory is exhausted ({text.splitlines()[0]}): use a smaller input or batch"
        case OverflowError():
            return f"a number is too large ({text})"
        case UnicodeEncodeError():
            return "a text holds half of a surrogate pair, which UTF-8 cannot write"
        case UnicodeDecodeError():
            return f"a file or text is not UTF-8 ({error.reason})"
        case OSError() if error.strerror:
            where = f"{show(str(error.filename))[1:-1]}: " if error.filename else ""
            return f"{where}{error.strerror}"
        case RuntimeError() if "home directory" in text:
            return "a path begins with a ~user that this machine does not know"
        case ValueError() if "integer string conversion" in text:
            return "an integer has more than 4,300 digits"
        case KeyError():
            return f"KeyError: there is no {text}"
    return f"{type(error).__name__}: {text or 'no reason given'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory is exhausted, the CPU's or an accelerator's."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    )


def describe_error(error: BaseException) -> str:
    """Return ``describe`` in one line that any file can hold: the error of one row."""
    line = describe(error).strip().partition("\n")[0]
    return line.encode("utf-8", "backslashreplace").decode()


def check_at_least(least: int, **options: int | None) -> None:
    """Raise SpecError for an option below ``least`` or beyond 64 bits; None means a default."""
    for name, value in options.items():
        if value is not None and value < least:
            raise SpecError(f"{name} must be at least {least}, got {show(value)}")
        if value is not None and value >= INT_LIMIT:
            raise SpecError(f"{name} must be below 2**63")


def check_shares(**options: float | None) -> None:
    """Raise SpecError for an option outside 0 to 1; None stands for a default."""
    for name, value in options.items():
        if value is not None and not 0 <= value <= 1:
            raise SpecError(f"{name} must lie between 0 and 1, got {value}")


def check_non_negative(**options: float | None) -> None:
    """Raise SpecError for an option that is negative, infinite or not a number."""
    for name, value in options.items():
        if value is not None and not 0 <= value < float("inf"):
            raise SpecError(f"{name} must be 0 or more, got {value}")
