"""What a part and each of its options mean, in a line, as its docstring says it."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"(\w+): (.*)")


def docstring_summary(cls: type) -> str:
    """Return the first sentence of a class's docstring, on one line; "" where it has none."""
    text = _own(cls)
    return " ".join(text.split("\n\n")[0].split())


def option_descriptions(cls: type) -> dict[str, str]:
    """Return what the ``Args:`` section of a class's docstring says of each parameter.

    A class that inherits its constructor inherits the descriptions of its options too.
    """
    owner = next(base for base in cls.__mro__ if "__init__" in base.__dict__)
    found: dict[str, str] = {} if owner is cls else option_descriptions(owner)
    name = ""
    for line in _section(_own(cls), "Args"):
        entry = _ENTRY.fullmatch(line[4:]) if re.match(r" {4}\S", line) else None
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def _own(cls: type) -> str:
    """The class's own docstring, or its constructor's: bases may be of other libraries."""
    said = cls.__dict__.get("__doc__") or ""
    init = cls.__dict__.get("__init__")
    if "Args:" not in said and init is not None and "Args:" in (init.__doc__ or ""):
        said += "\n\n" + (inspect.getdoc(init) or "")
    return inspect.cleandoc(said)


def _section(text: str, title: str) -> list[str]:
    """The indented lines below ``title:``."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line == f"{title}:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line:
            lines.append(line)
    return lines
