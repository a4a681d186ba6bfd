"""The errors that a user of diffa can cause; a message says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffaError(Exception):
    """Base of every error that a user of diffa can cause and correct."""


class SpecError(DiffaError):
    """A spec, a question or an option asks for something that does not exist or does not fit."""


class PluginError(DiffaError):
    """A part cannot be found or imported, or breaks the contract of its kind."""


class CheckpointError(DiffaError):
    """Published or saved weights are missing, unreadable, or do not fit the part."""


class AudioError(DiffaError):
    """A recording is missing, unreadable, empty, not finite, or too long for the context."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known names close to ``word``, else all of them."""
    names = sorted(known)
    if not names:
        return "; there is none"
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return ", did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "; known: " + ", ".join(names)
