"""Write the first version of a plugin: a package with one part that passes its own tests."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from diffa.errors import SpecError, suggest
from diffa.spec import registry

_TEMPLATES = Path(__file__).parent.parent / "assets" / "templates"

# what the suite of each template must know: the flags that say what the template rightly does
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

# this line is what makes diffa find the part: its name in specs, and where its class is
[project.entry-points."diffa.{kind}s"]
{name} = "{module}:{cls}"

[tool.setuptools]
py-modules = ["{module}"]
"""

_TEST = '''\
"""The conformance of {name}: everything diffa asks of {article_low} {kind}."""

from diffa.testing import {suite}


class Test{cls}({suite}):
    name = "{name}"
{flags}'''

_README = """\
# {name}

{article} {kind} for `diffa`. Install it, and specs can name it:

```yaml
{example}
```

    pip install -e '.[test]'
    pytest
    diffa plugins check {kind}:{name}

`{module}.py` is the whole plugin. Its constructor is its schema: parameters by position are given
by diffa ({wires}), parameters by keyword are options of a spec. `tests/` runs diffa's conformance
suite; what the part rightly does otherwise is said there by a flag (see `diffa.testing`).
"""

_EXAMPLES = {
    "encoder": "encoder: {{name: {name}}}",
    "adapter": "adapters:\n  audio: {{name: {name}}}",
    "backbone": "backbone: {{name: {name}}}",
    "sampler": "sampler: {{name: {name}}}",
    "objective": "objective: {{name: {name}}}",
}


class Plugin(NamedTuple):
    """Where a new plugin lies and how to go on with it."""

    folder: Path
    files: tuple[Path, ...]
    next: tuple[str, ...]


def new(name: str, kind: str, folder: str | Path = ".") -> Plugin:
    """Write the plugin ``name`` with one part of a kind into ``folder / name``.

    It can be installed with pip at once, and passes its own conformance tests.

    Raises:
        SpecError: no such kind, a name that cannot be used, or a folder that is there already.
    """
    _check(name, kind)
    place = Path(folder) / name
    if place.exists():
        raise SpecError(f"{place} is there already: choose another name or remove it")
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


def _check(name: str, kind: str) -> None:
    if kind not in registry.KINDS:
        raise SpecError(f"there is no kind of part {kind!r}{suggest(kind, registry.KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SpecError(
            f"a plugin's name is small letters, digits and single hyphens, such as 'my-{kind}', "
            f"got {name!r}"
        )
    if any(part.is_builtin and part.name == name for part in registry.list_parts(kind)):
        raise SpecError(f"diffa has {kind} {name!r} of its own, which would win: choose another")
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is not None:
        raise SpecError(f"a Python module {module!r} is installed already: choose another name")


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
        "wires": ", ".join(f"`{wire}`" for wire in registry.WIRES[kind]) or "none here",
        "example": _EXAMPLES[kind].format(name=name),
    }


def _source(kind: str, cls: str) -> str:
    """Return the template of a kind with its class renamed."""
    text = (_TEMPLATES / f"{kind}.py").read_text(encoding="utf-8")
    return text.replace("class Part", f"class {cls}")
