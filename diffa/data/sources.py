"""Sources of samples by name: diffa's own, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffa.data.samples import DataError, Source
from diffa.errors import SpecError, suggest
from diffa.spec import registry
from diffa.spec.schema import coerce, read_schema, to_plain

SourceFactory = Callable[..., Source]


def open_source(
    name: str, options: Mapping[str, Any], extra: Mapping[str, SourceFactory] | None = None
) -> Source:
    """Make a source by name.

    Args:
        name: an entry point of the group ``diffa.sources``, or a key of ``extra``.
        options: keyword arguments of the source's constructor.
        extra: factories that take precedence over the installed ones.

    Raises:
        DataError: the name or an option is unknown, or an option does not fit.
        PluginError: the source's package is broken.
    """
    factory = (extra or {}).get(name)
    try:
        if factory is None:
            factory = _installed(name, extra or {})
            options = _fitted(factory, options)
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise DataError(f"source {name!r}: {error}") from error


def _installed(name: str, extra: Mapping[str, SourceFactory]) -> type[Any]:
    try:
        registry.find_part("source", name)
    except SpecError as error:
        known = (*extra, *registry.available("source"))
        text = str(error) if "ambiguous" in str(error) else ""
        raise DataError(text or f"there is no source {name!r}{suggest(name, known)}") from error
    return registry.load_part("source", name)


def _fitted(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the constructor declares them; raises ValueError with every fault."""
    known = read_schema(cls).options
    faults = [
        f"there is no option {key!r}{suggest(key, known)}" for key in options if key not in known
    ]
    fitted = {
        key: coerce(
            to_plain(value),
            known[key].hint,
            key,
            lambda path, text: faults.append(f"{path}: {text}"),
        )
        for key, value in options.items()
        if key in known
    }
    if faults:
        raise ValueError("; ".join(faults))
    return fitted
