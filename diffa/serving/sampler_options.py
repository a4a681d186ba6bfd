"""Samplers of requests: a preset of the spec, or options within the bounds of the server."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from diffa.build import swap
from diffa.errors import DiffaError
from diffa.serving.errors import bad_request
from diffa.spec import registry
from diffa.spec.schema import accepts_mapping, coerce, read_schema

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.types import Sampler

# A request must not occupy the server for long: what these options may be is bounded, whatever
# the sampler accepts. Options that are not listed, such as those of other packages, have the
# bounds of _ANY_NUMBER.
BOUNDS: dict[str, tuple[float, float]] = {
    "block_length": (1, 512),
    "threshold": (0.0, 1.0),
    "factor": (0.0, 16.0),
    "entropy_bound": (0.0, 16.0),
    "neighbor_threshold": (0.0, 1.0),
    "run_threshold": (0.0, 1.0),
    "kl_threshold": (0.0, 16.0),
    "credit_strength": (0.0, 4.0),
    "temperature": (0.0, 2.0),
    "cfg_scale": (0.0, 8.0),
    "vicinity_window": (0, 64),
    "audio_refresh_interval": (1, 64),
    "drift_threshold": (0.0, 1.0),
    "draft_steps": (1, 16),
    "top_p": (0.0, 1.0),
}
_ANY_NUMBER = (-4096, 4096)
_RULES = ("steps", "threshold", "factor", "entropy_bound")
_REFINEMENTS = (
    "neighbor_threshold",
    "run_threshold",
    "kl_threshold",
)  # of a rule, and refused without it
_CACHE_SIZE = 64


class KeyedSampler(NamedTuple):
    """A sampler, and a key that is equal for samplers with equal options."""

    sampler: Sampler
    key: str


class SamplerCache:
    """Build the samplers that requests name, and keep recent ones; thread-safe.

    Args:
        model: its spec has the default sampler and the sampler presets.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._default: dict[str, Any] = model.spec.data["sampler"]
        self._presets: Mapping[str, dict[str, Any]] = model.spec.data.get("sampler_presets") or {}
        self._entries: OrderedDict[str, KeyedSampler] = OrderedDict()
        # Held while a sampler is built too: equal requests wait for one sampler, and build none.
        self._lock = threading.Lock()

    def get(
        self,
        options: str | Mapping[str, Any] | None,
        temperature: float | None,
        param: str,
        preset: str | None = None,
    ) -> KeyedSampler:
        """Return the sampler of a request.

        Args:
            options: a preset's name, or options that change ``preset``. None: ``preset`` itself.
            temperature: replaces the sampler's temperature.
            param: name of ``options`` in errors.
            preset: the sampler preset that the request's model names. None: the spec's sampler.

        Raises:
            RequestError: unknown options, out of bounds, or options that exclude each other.
        """
        spec = self._merge(options, param, preset)
        if temperature is not None:
            spec["temperature"] = temperature
        key = repr(sorted(spec.items()))
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            try:
                entry = KeyedSampler(swap(self._model, sampler=spec).sampler, key)
            except (DiffaError, TypeError, ValueError, OverflowError) as error:
                raise bad_request(f"{param}: {error}", param) from error
            self._entries[key] = entry
            while len(self._entries) > _CACHE_SIZE:
                self._entries.popitem(last=False)
            return entry

    def _merge(
        self, options: str | Mapping[str, Any] | None, param: str, preset: str | None
    ) -> dict[str, Any]:
        """Return the ``sampler`` of a spec."""
        base = self._default if preset is None else self._presets[preset]
        if options is None:
            return dict(base)
        if isinstance(options, str):
            if options not in self._presets:
                known = ", ".join(self._presets)
                raise bad_request(f"{param}: no preset {options!r}; known: {known}", param)
            return dict(self._presets[options])
        name = options.get("name", base["name"])
        validate_sampler_options(name, options, param)
        merged = dict(base) if name == base["name"] else {}
        # The rules exclude each other, since each decides how many tokens a pass unmasks: a
        # request that sets one replaces the one of its base, with its refinements.
        if any(options.get(rule) is not None for rule in _RULES):
            merged = {k: v for k, v in merged.items() if k not in (*_RULES, *_REFINEMENTS)}
        return {**merged, **options}


def validate_sampler_options(name: object, options: Mapping[str, Any], param: str) -> None:
    """Check options against the schema of a sampler's constructor, and against ``BOUNDS``.

    Raises:
        RequestError: an unknown sampler or option, another type, or a number out of bounds.
    """
    try:
        known = read_schema(registry.load_part("sampler", str(name))).options
    except DiffaError as error:
        raise bad_request(f"{param}.name: {error}", f"{param}.name") from error
    for key, value in options.items():
        if key == "name":
            continue
        place = f"{param}.{key}"
        if key not in known or accepts_mapping(known[key].hint):
            names = ", ".join(["name", *known])
            raise bad_request(f"{place} is no option of {name!r}; known: {names}", place)
        coerce(value, known[key].hint, place, _refuse_misfit)
        low, high = BOUNDS.get(key, _ANY_NUMBER)
        if isinstance(value, int | float) and not low <= value <= high:
            raise bad_request(f"{place} must lie between {low:g} and {high:g}", place)


def _refuse_misfit(place: str, fault: str) -> None:
    raise bad_request(f"{place}: {fault}"[:300], place)
