"""Read a part's constructor as its schema, and convert values to the declared types."""

from __future__ import annotations

import collections.abc as abc
import inspect
import math
import types
import typing
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from diffa.errors import INT_LIMIT, PluginError, show, suggest

Report = Callable[[str, str], None]
"""Called with the dotted path of a fault and what is wrong there."""

_SCALARS = (bool, int, float, str)
_LISTS = (list, abc.Sequence)
_MAPPINGS = (dict, abc.Mapping)
_DEPTH = 32


class Option(NamedTuple):
    """A keyword-only parameter: its resolved type hint and its default."""

    hint: Any
    default: Any


class Schema(NamedTuple):
    """Parameters of a part: wires, passed by ``build``, and options, written in a spec."""

    wires: tuple[str, ...]
    options: dict[str, Option]


_read: weakref.WeakKeyDictionary[type, Schema] = weakref.WeakKeyDictionary()


def read_schema(cls: type) -> Schema:
    """Return the wires and options of a part; raises PluginError for any other constructor."""
    if cls not in _read:
        _read[cls] = _schema(cls)
    return _read[cls]


def _schema(cls: type) -> Schema:
    wires, options = [], {}
    for parameter in _parameters(cls):
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise PluginError(
                f"the constructor of {cls.__name__} takes {star}{name}; name every parameter: "
                "wires by position, options by keyword only"
            )
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[name] = _option(cls, parameter)
        else:
            wires.append(name)
    return Schema(tuple(wires), options)


def coerce(value: Any, hint: Any, path: str, report: Report) -> Any:
    """Return ``value`` converted to ``hint`` (1 becomes 1.0 for a float).

    Args:
        value: Plain JSON types.
        hint: Type hint of the option.
        path: Dotted path of the value, for reports.
        report: Called for every fault; the value then stays as it is.
    """
    exact = _fit(value, hint, widen=False)
    if exact is not _MISFIT:
        return exact
    wide = _fit(value, hint, widen=True)
    if wide is not _MISFIT:
        return wide
    _explain(value, hint, path, report)
    return value


def describe_type(hint: Any) -> str:
    """Return a type hint in a spec's words: ``int or null``, ``one of 'a', 'b'``."""
    hint = _unwrap(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in inner)
    if hint in _LISTS or origin in _LISTS:
        return f"list of {describe_type(inner[0])}" if inner else "list"
    if hint in _MAPPINGS or origin in _MAPPINGS:
        return "mapping"
    if hint in (None, type(None)):
        return "null"
    return "any value" if hint in (Any, object) else getattr(hint, "__name__", str(hint))


def accepts_mapping(hint: Any) -> bool:
    """Return whether a mapping can be a value of this hint."""
    hint = _unwrap(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(accepts_mapping(part) for part in get_args(hint))
    return hint in (Any, object, *_MAPPINGS) or get_origin(hint) in _MAPPINGS


def to_plain(value: Any, depth: int = 0) -> Any:
    """Copy a value into plain JSON types; paths become text, other types stay as they are."""
    if isinstance(value, Mapping) and depth < _DEPTH:
        return {key: to_plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple) and depth < _DEPTH:
        return [to_plain(inner, depth + 1) for inner in value]
    if hasattr(value, "__fspath__"):
        return str(value)
    for kind in _SCALARS:  # numpy's float64 and enumerations of text are subclasses
        if isinstance(value, kind):
            return kind(value) if type(value) not in _SCALARS else value
    return value


def _parameters(cls: type) -> list[inspect.Parameter]:
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    if owner is object or owner.__module__.startswith("torch."):
        return []
    return list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]


def _option(cls: type, parameter: inspect.Parameter) -> Option:
    where = f"option {parameter.name!r} of {cls.__name__}"
    if parameter.name == "name":
        raise PluginError(f"{where} cannot be written: a spec's 'name' names the part; rename it")
    if parameter.annotation is parameter.empty:
        raise PluginError(f"{where} has no type; annotate it, for example `: int = 4`")
    if parameter.default is parameter.empty:
        raise PluginError(f"{where} has no default; a spec may leave any option out")
    hint = _resolve(cls, parameter.annotation, where)
    _require_json(hint, where)
    faults: list[str] = []
    default = coerce(to_plain(parameter.default), hint, "", lambda _, text: faults.append(text))
    if faults:
        raise PluginError(f"the default of {where} does not fit: {'; '.join(faults)}")
    return Option(hint, default)


def _resolve(cls: type, annotation: Any, where: str) -> Any:
    """Evaluate an annotation where the constructor was written; only this one, not the wires'."""
    init = next(vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base))
    bearer = types.SimpleNamespace(__annotations__={"hint": annotation})
    try:
        return typing.get_type_hints(bearer, globalns=getattr(init, "__globals__", {}))["hint"]
    except Exception as error:
        raise PluginError(f"the type of {where} cannot be read: {error}") from error


def _require_json(hint: Any, where: str) -> None:
    """Refuse hints whose values JSON cannot hold."""
    hint = _unwrap(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (*_SCALARS, *_LISTS, *_MAPPINGS, Any, object, None, type(None)):
        return
    if origin is Literal and all(isinstance(choice, str | int | None) for choice in inner):
        return
    if origin in _MAPPINGS and inner[0] is not str:
        raise PluginError(f"{where} is a mapping whose keys are not str")
    if origin in (Union, types.UnionType, *_LISTS, *_MAPPINGS):
        for part in inner[1:] if origin in _MAPPINGS else inner:
            _require_json(part, where)
        return
    raise PluginError(
        f"{where} has the type {describe_type(hint)}, which JSON cannot hold; use bool, int, "
        "float, str, Literal, list[...], Mapping[str, ...] or `X | None`"
    )


def _unwrap(hint: Any) -> Any:
    """Resolve ``type X = ...`` and ``Annotated`` to the type inside."""
    while hasattr(hint, "__value__") or get_origin(hint) is typing.Annotated:
        hint = hint.__value__ if hasattr(hint, "__value__") else get_args(hint)[0]
    return hint


# --- fitting a value ---------------------------------------------------------------------------

_MISFIT = object()


def _fit(value: Any, hint: Any, *, widen: bool) -> Any:
    """Return the value converted to the hint, or _MISFIT; ``widen`` makes ints floats."""
    hint = _unwrap(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        fits = (_fit(value, part, widen=widen) for part in inner)
        return next((fitted for fitted in fits if fitted is not _MISFIT), _MISFIT)
    if origin is Literal:
        same = any(type(value) is type(choice) and value == choice for choice in inner)
        return value if same else _MISFIT
    if hint in _LISTS or origin in _LISTS:
        return _fit_items(value, list, inner[0] if inner else Any, widen)
    if hint in _MAPPINGS or origin in _MAPPINGS:
        return _fit_items(value, dict, inner[1] if inner else Any, widen)
    if hint in (Any, object):
        return value if _is_json(value) else _MISFIT
    if hint is float and widen and type(value) is int:
        return _as_float(value)
    fits_scalar = type(value) is (type(None) if hint is None else hint)
    return value if fits_scalar and _is_json(value) else _MISFIT


def _fit_items(value: Any, kind: type[Any], inner: Any, widen: bool) -> Any:
    if type(value) is not kind or (kind is dict and not all(type(k) is str for k in value)):
        return _MISFIT
    pairs = value.items() if kind is dict else enumerate(value)
    fitted = {key: _fit(item, inner, widen=widen) for key, item in pairs}
    if any(item is _MISFIT for item in fitted.values()):
        return _MISFIT
    return fitted if kind is dict else list(fitted.values())


def _is_json(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < _DEPTH and all(
            type(key) is str and _is_json(inner, depth + 1) for key, inner in value.items()
        )
    if isinstance(value, list):
        return depth < _DEPTH and all(_is_json(inner, depth + 1) for inner in value)
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return abs(value) < INT_LIMIT
    return value is None or type(value) in _SCALARS


def _as_float(value: int) -> Any:
    try:
        return float(value)
    except OverflowError:
        return _MISFIT


def _explain(value: Any, hint: Any, path: str, report: Report) -> None:
    """Report why a value does not fit, at the innermost place that is wrong."""
    hint = _unwrap(hint)
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for part in parts:
        origin, inner = get_origin(part), get_args(part)
        pairs: Any = ()
        if inner and type(value) is list and origin in _LISTS:
            pairs = enumerate(value)
        elif inner and type(value) is dict and origin in _MAPPINGS:
            pairs = value.items() if all(type(key) is str for key in value) else ()
        for key, item in pairs:
            if _fit(item, inner[-1], widen=True) is _MISFIT:
                _explain(item, inner[-1], f"{path}.{key}".lstrip("."), report)
        if pairs != ():
            return
    report(path, f"expected {describe_type(hint)}, got {show(value)}{_hint_at(value, parts)}")


def _hint_at(value: Any, parts: tuple[Any, ...]) -> str:
    """Return what to do about the commonest misfits."""
    if type(value) is float and not math.isfinite(value):
        return "; it must be finite"
    if type(value) is int and abs(value) >= INT_LIMIT:
        return "; integers have at most 64 bits"
    if str in parts and type(value) in (bool, int, float):
        return "; quote it"
    if value == "None" and type(None) in parts:
        return "; write null"
    choices = [c for part in parts for c in get_args(part) if get_origin(part) is Literal]
    if not choices or not isinstance(value, str):
        return ""
    near = suggest(value, [c for c in choices if isinstance(c, str)])
    return near if "did you mean" in near else ""
