"""Read YAML 1.2 and JSON without duplicate keys or surprising types, and write YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from diffa.errors import SpecError, describe
from diffa.runtime.text import parse_json as load_json

_MAX_REPEATED = 100_000  # values and characters that aliases may add to a document
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-4 is a number, while `no`, `1:30` and 2026-01-31 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a key that is given twice."""
        keys: set[str] = set()
        for key, _ in node.value:
            if key.value in keys and isinstance(key.value, str):
                mark = key.start_mark
                raise SpecError(f"line {mark.line + 1}: {key.value!r} is given twice")
            keys.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))


def _number(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))  # PyYAML's own reads 010 as octal


_Loader.add_constructor(_TAG + "int", _number)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text; raises SpecError with the line that is malformed."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        own: dict[int, int] = {}
        if _expanded_size(node, {}, own) - sum(own.values()) > _MAX_REPEATED:
            raise SpecError(
                "not YAML that can be read: its aliases expand to over "
                f"{_MAX_REPEATED:,} values or characters"
            )
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise SpecError(f"not YAML: {where}{getattr(error, 'problem', None) or error}") from error
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:
        raise SpecError(f"not YAML that can be read: {describe(error)}") from error
    except Exception as error:  # PyYAML's constructors raise several types
        raise SpecError(
            "not YAML that can be read: a value does not fit its tag, or a key is a list or mapping"
        ) from error


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None], own: dict[int, int]) -> int:
    """Count values and characters below a node, what aliases repeat included; ``own`` gets each
    node's own.

    Raises:
        SpecError: An alias contains itself.
    """
    key = id(node)
    if key in sizes:
        size = sizes[key]
        if size is None:
            raise SpecError(f"line {node.start_mark.line + 1}: an alias contains itself")
        return size
    sizes[key] = None  # being counted
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    own[key] = 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
    sizes[key] = size = own[key] + sum(_expanded_size(part, sizes, own) for part in inner)
    return size


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; raises SpecError with the line that is malformed."""
    try:
        return load_json(text, pairs=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise SpecError(f"not JSON: line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise SpecError(f"not JSON that can be read: {error}") from error


def read_mapping(path: Path) -> dict[Any, Any]:
    """Return the mapping in a YAML or JSON file; raises SpecError with the file and the fault."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SpecError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read as text: {error}") from error
    try:
        value = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        content = "nothing" if value is None else f"a {type(value).__name__}"
        raise SpecError(f"{path} holds {content}, not a mapping such as `encoder: whisper`")
    return value


def write_yaml(value: Any) -> str:
    """Return YAML in the order given, short lists and plain options on one line."""
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
        default_flow_style=None,
    )


class _Dumper(yaml.SafeDumper):
    """Write scalars so that readers of YAML 1.1 and of 1.2 find the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        """Repeat equal values instead of writing anchors."""
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)  # 1e-05 lacks the dot that YAML 1.1 asks for
    text = text.replace("e", ".0e") if "e" in text and "." not in text else text
    return dumper.represent_scalar(_TAG + "float", text)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    if not value.isprintable():  # PyYAML loses U+0085 and its like in other styles
        return dumper.represent_scalar(_TAG + "str", value, style='"')
    looks_typed = any(
        pattern.match(value)
        for patterns in _Loader.yaml_implicit_resolvers.values()
        for _, pattern in patterns
    )
    return dumper.represent_scalar(_TAG + "str", value, style="'" if looks_typed else None)


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise SpecError(f"{key!r} is given twice")
        mapping[key] = value
    return mapping
