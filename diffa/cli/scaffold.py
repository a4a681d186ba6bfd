"""Write a new plugin: a package with one part that passes its own tests."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from diffa.errors import SpecError, suggest
from diffa.spec import registry

_TEMPLATES = Path(__file__).parent.parent / "assets" / "templates"

# Flags of the conformance suites: what a template does that not every part of its kind does.
_FLAGS = {"objective": "    unbiased = True\n"}

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
description = "{article} {kind} for diffa"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["diffa-audio"]

[project.optional-dependencies]
test = ["pytest>=8"]

# The entry point lets diffa find the part: its name in specs, and its class.
[project.entry-points."diffa.{kind}s"]
{name} = "{module}:{cls}"

[tool.setuptools]
py-modules = ["{module}"]
"""

_TEST = '''\
"""Check that {name} meets the contract of {article_low} {kind}."""

from diffa.testing import {suite}


class Test{cls}({suite}):
    name = "{name}"
{flags}'''

_README = """\
# {name}

{article} {kind} for diffa. After installing it, use it in a spec:

```yaml
{example}
```

    pip install -e '.[test]'
    pytest
    diffa plugins check {kind}:{name}

`{module}.py` is the whole plugin. Its constructor is its schema: diffa passes the positional
parameters ({wires}), and keyword parameters are options in a spec. `tests/` runs diffa's
conformance suite; the suite's flags declare deviations (see `diffa.testing`).
"""

_EXAMPLES = {
    "encoder": "encoder: {{name: {name}}}",
    "adapter": "adapters:\n  audio: {{name: {name}}}",
    "backbone": "backbone: {{name: {name}}}",
    "sampler": "sampler: {{name: {name}}}",
    "objective": "objective: {{name: {name}}}",
}


class Plugin(NamedTuple):
    """A new plugin: its folder, its files and the commands to run next."""

    folder: Path
    files: tuple[Path, ...]
    next: tuple[str, ...]


def write_plugin(name: str, kind: str, folder: str | Path = ".") -> Plugin:
    """Write the plugin ``name`` with one part of a kind into ``folder / name``.

    The package can be installed with pip and passes its own conformance tests.

    Raises:
        SpecError: The kind is unknown, the name cannot be used, or the folder exists.
    """
    _check_name(name, kind)
    place = Path(folder) / name
    if place.exists():
        raise SpecError(f"{place} exists: choose another name or remove it")
    words = _words(name, kind)
    files = {
        "pyproject.toml": _PYPROJECT.format(**words),
        f"{words['module']}.py": _source(kind, words["cls"]),
        f"tests/test_{words['module']}.py": _TEST.format(**words),
        "README.md": _README.format(**words),
    }
    for file, text in files.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(text, encoding="utf-8")
    steps = (f"pip install -e {place}", f"pytest {place}", f"diffa plugins check {kind}:{name}")
    return Plugin(place, tuple(place / file for file in files), steps)


def _check_name(name: str, kind: str) -> None:
    if kind not in registry.KINDS:
        raise SpecError(f"there is no kind of part {kind!r}{suggest(kind, registry.KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SpecError(
            "a plugin's name has lower-case letters, digits and single hyphens, "
            f"such as 'my-{kind}', got {name!r}"
        )
    if any(part.is_builtin and part.name == name for part in registry.list_parts(kind)):
        raise SpecError(
            f"diffa ships a {kind} {name!r}, which takes precedence: choose another name"
        )
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is not None:
        raise SpecError(f"a Python module {module!r} is installed: choose another name")


def _words(name: str, kind: str) -> dict[str, str]:
    article = "An" if kind[0] in "aeiou" else "A"
    return {
        "name": name,
        "kind": kind,
        "module": name.replace("-", "_"),
        "cls": "".join(word.capitalize() for word in name.split("-")),
        "suite": f"{kind.capitalize()}Suite",
        "article": article,
        "article_low": article.lower(),
        "flags": _FLAGS.get(kind, ""),
        "wires": ", ".join(f"`{wire}`" for wire in registry.WIRES[kind]) or "none for this kind",
        "example": _EXAMPLES[kind].format(name=name),
    }


def _source(kind: str, cls: str) -> str:
    """Return the template of a kind with its class renamed."""
    text = (_TEMPLATES / f"{kind}.py").read_text(encoding="utf-8")
    return text.replace("class Part", f"class {cls}")
