"""What can go wrong for a user, and how it is said: what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffaError(Exception):
    """Anything a user of diffa can cause and mend."""


class SpecError(DiffaError):
    """A spec, a question or an option asks for something that does not exist or does not fit."""


class PluginError(DiffaError):
    """A part cannot be found, imported or trusted to be what it says it is."""


class CheckpointError(DiffaError):
    """Published or saved weights are missing, unreadable, or do not fit the part that asks."""


class AudioError(DiffaError):
    """A recording is missing, unreadable, empty, not finite, or too long for the context."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that names what was probably meant, or all there is."""
    names = sorted(known)
    if not names:
        return "; there is none"
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return ", did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "; known: " + ", ".join(names)
