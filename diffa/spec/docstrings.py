"""Read a part's summary and its options' descriptions off its docstring."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"(\w+): (.*)")


def docstring_summary(cls: type) -> str:
    """Return the first paragraph of a class's docstring on one line; "" without a docstring."""
    return " ".join(_docstring(cls).split("\n\n")[0].split())


def option_descriptions(cls: type) -> dict[str, str]:
    """Return what the ``Args:`` sections of a class and its bases say of each parameter.

    Bases in other packages do not count.
    """
    package = cls.__module__.partition(".")[0]
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] == package:
            descriptions |= _own_descriptions(base)
    return descriptions


def _own_descriptions(cls: type) -> dict[str, str]:
    descriptions: dict[str, str] = {}
    name = ""
    inside = False
    for line in _docstring(cls).splitlines():
        if line and not line.startswith(" "):  # a section ends at the next unindented line
            inside = line == "Args:"
        elif inside and line:
            entry = _ENTRY.fullmatch(line[4:]) if re.match(r" {4}\S", line) else None
            if entry:
                name = entry[1]
                descriptions[name] = entry[2]
            elif name:
                descriptions[name] += " " + line.strip()
    return descriptions


def _docstring(cls: type) -> str:
    """Return the class's own docstring and its constructor's: bases may be of other libraries."""
    text = cls.__dict__.get("__doc__") or ""
    init = cls.__dict__.get("__init__")
    if "Args:" not in text and init is not None and "Args:" in (init.__doc__ or ""):
        text += "\n\n" + (inspect.getdoc(init) or "")
    return inspect.cleandoc(text)
