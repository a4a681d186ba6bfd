"""Find parts among the entry points of installed packages, and import them when needed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
import sys
from typing import Any, NamedTuple

from diffa.errors import PluginError, SpecError, suggest
from diffa.spec.schema import read_schema

DISTRIBUTION = "diffa-audio"
"""The name under which the package index has this library; ``diffa`` there is another project."""

KINDS = ("encoder", "adapter", "backbone", "sampler", "objective")
"""The kinds of part that a spec names."""

PLUGIN_KINDS = (*KINDS, "source", "learner", "suite")
"""Everything a package can offer: parts, what a recipe names, and benchmarks (docs/plugins.md)."""

WIRES: dict[str, tuple[str, ...]] = {
    "encoder": (),
    "adapter": ("source", "width"),
    "backbone": (),
    "sampler": ("vocab",),
    "objective": ("vocab",),
    "source": (),
    "learner": ("model", "stage", "sources", "cache"),
    "suite": ("subset",),
}
"""What diffa offers each kind; a part asks for the ones it wants, by name."""

_MEMBERS: dict[str, tuple[str, ...]] = {
    "encoder": ("__call__",),
    "adapter": ("__call__", "out_lengths"),
    "backbone": ("__call__", "embed", "head"),
    "sampler": ("__call__", "decoding"),
    "objective": ("corrupt", "loss", "decoding"),
    "source": ("__len__", "__getitem__"),
    "learner": ("__call__", "row_transform", "collator"),
    "suite": ("find_fault", "question", "score"),
}


class Part(NamedTuple):
    """An installed part: its entry point and the distribution that declares it."""

    kind: str
    name: str
    dist: str
    version: str
    target: str
    extras: tuple[str, ...]

    @property
    def origin(self) -> str:
        """The part as errors name it."""
        return f"{self.kind} {self.name!r} from {self.dist} ({self.target})"

    @property
    def is_builtin(self) -> bool:
        """Whether diffa itself ships the part."""
        return self.dist == DISTRIBUTION


class _Scan(NamedTuple):
    parts: dict[str, tuple[Part, ...]]
    faults: tuple[str, ...]


_cached: _Scan | None = None


def available(kind: str) -> tuple[str, ...]:
    """Return the names of the installed parts of a kind; "package:name" where two share one."""
    return tuple(sorted(short_name(part) for part in list_parts(kind)))


def list_parts(kind: str) -> tuple[Part, ...]:
    """Return every installed part of a kind, diffa's own first; nothing is imported."""
    if kind not in PLUGIN_KINDS:
        raise SpecError(f"there is no kind of part {kind!r}{suggest(kind, PLUGIN_KINDS)}")
    return _scan().parts[kind]


def scan_faults() -> tuple[str, ...]:
    """Return what is wrong with installed packages whose entry points cannot be read."""
    return _scan().faults


def find_part(kind: str, name: str) -> Part:
    """Return the part of a name; raises SpecError where it is unknown or ambiguous."""
    installed = list_parts(kind)
    if not installed:
        raise SpecError(
            f"no {kind} is installed: diffa is not installed here; run pip install -e ."
        )
    package, _, short = name.rpartition(":")
    matches = [part for part in installed if part.name == short]
    if package:
        matches = [part for part in matches if _normal(part.dist) == _normal(package)]
    elif any(part.is_builtin for part in matches):
        matches = [part for part in matches if part.is_builtin]
    if not matches:
        raise SpecError(f"there is no {kind} {name!r}{suggest(name, available(kind))}")
    if len({part.dist for part in matches}) > 1:
        choices = " or ".join(repr(f"{part.dist}:{part.name}") for part in matches)
        raise SpecError(f"{kind} {name!r} is ambiguous: write {choices}")
    if len(matches) > 1:
        targets = " and ".join(part.target for part in matches)
        raise PluginError(f"{kind} {name!r} is declared twice by {matches[0].dist}: {targets}")
    return matches[0]


def load_part(kind: str, name: str) -> type[Any]:
    """Return the class of a part; raises PluginError where its import or its contract fails."""
    part = find_part(kind, name)
    module, _, attribute = part.target.partition(":")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results, such as --json
            cls: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{part.origin} failed to import: {_reason(error)}{_remedy(part, error)}"
        ) from error
    for step in attribute.split("."):
        cls = getattr(cls, step, None)
    if cls is None:
        raise PluginError(f"{part.origin} does not exist: {module} has no {attribute!r}")
    try:
        validate_part(kind, cls)
    except PluginError as error:
        raise PluginError(f"{error}; it is {part.origin}") from error
    return cls  # type: ignore[no-any-return]


def validate_part(kind: str, cls: Any) -> None:
    """Raise PluginError unless a class has the members, wires and options its kind must have."""
    if not isinstance(cls, type):
        raise PluginError(f"{kind} {cls!r} is not a class")
    missing = [member for member in _MEMBERS[kind] if not _has(cls, member)]
    if missing:
        raise PluginError(f"{kind} {cls.__name__} lacks {', '.join(missing)}")
    offered = WIRES[kind]
    for wire in read_schema(cls).wires:
        if wire not in offered:
            raise PluginError(
                f"{kind} {cls.__name__} asks for the wire {wire!r}{suggest(wire, offered)} "
                "(options are keyword-only: put them after `*`)"
            )


def clear_scan() -> None:
    """Forget the scan of installed packages, after one was installed or removed."""
    global _cached
    _cached = None
    importlib.invalidate_caches()


def _scan() -> _Scan:
    """Read the entry points of every installed package once; keep the result if none failed."""
    global _cached
    if _cached is not None:
        return _cached
    parts: dict[str, list[Part]] = {kind: [] for kind in PLUGIN_KINDS}
    names: set[str] = set()
    broken: list[str] = []
    for dist in importlib.metadata.distributions():
        try:
            _collect(dist, names, parts)
        except Exception as error:  # one package's damage must not hide the others
            folder = getattr(dist, "_path", dist)
            broken.append(f"the entry points of {folder} cannot be read: {_reason(error)}")
    order = {
        k: sorted(v, key=lambda p: (not p.is_builtin, p.name, p.dist)) for k, v in parts.items()
    }
    scan = _Scan({kind: tuple(order[kind]) for kind in PLUGIN_KINDS}, tuple(broken))
    if not broken:
        _cached = scan
    return scan


def _collect(
    dist: importlib.metadata.Distribution, names: set[str], parts: dict[str, list[Part]]
) -> None:
    text = dist.read_text("entry_points.txt")
    if not text or "diffa." not in text:
        return  # most packages: not even their metadata is read
    name, version = dist.metadata["Name"], dist.version
    if not name:
        raise ValueError("the package has no name")
    if _normal(name) in names:
        return  # an editable install shows twice; the first on the path is the one imported
    names.add(_normal(name))
    for point in dist.entry_points:
        kind = point.group.removeprefix("diffa.").removesuffix("s")
        if kind in PLUGIN_KINDS and point.group == f"diffa.{kind}s":
            target = point.value.partition("[")[0].strip()
            part = Part(kind, point.name, name, version, target, tuple(point.extras))
            if part not in parts[kind]:
                parts[kind].append(part)


def short_name(part: Part) -> str:
    """Return the shortest name that ``find_part`` resolves to this part."""
    if part.is_builtin:
        return part.name
    rivals = [other for other in list_parts(part.kind) if other.name == part.name]
    return part.name if len(rivals) == 1 else f"{part.dist}:{part.name}"


def _has(cls: type, member: str) -> bool:
    """Return whether a class or its bases outside Python and torch declare a member."""
    names = ("forward", "__call__") if member == "__call__" else (member,)
    own = [base for base in cls.__mro__ if base is not object and base.__module__[:6] != "torch."]
    return any(
        name in vars(base) or name in vars(base).get("__annotations__", {})
        for base in own
        for name in names
    )


def _reason(error: BaseException) -> str:
    text = str(error).strip() or "no reason given"
    return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"


def _remedy(part: Part, error: BaseException) -> str:
    if part.extras:
        return f"; it needs pip install '{part.dist}[{','.join(part.extras)}]'"
    if not part.is_builtin:
        return f"; mend it with pip install --force-reinstall {part.dist}, or uninstall it"
    return "; `diffa doctor` shows what works here" if isinstance(error, ImportError) else ""


def _normal(dist: str) -> str:
    return re.sub(r"[-_.]+", "-", dist).lower()
