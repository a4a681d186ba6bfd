"""Sampler options that a request may set, and within which ranges."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffa.errors import DiffaError
from diffa.serving.errors import bad_request

RANGES: dict[str, tuple[float, float]] = {
    "block_length": (1, 512),
    "steps": (1, 4096),
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
    "suffix_window": (0, 4096),
    "audio_refresh_interval": (1, 64),
    "drift_threshold": (0.0, 1.0),
}
CHOICES = ("name", "ranking", "cfg_drop", "cache", "stop_at_eos")
_KEPT = 64


class Chosen(NamedTuple):
    """A sampler and what makes it equal to another one."""

    sampler: Any
    kind: str


class Samplers:
    """The samplers of a model by what requests ask for: a sampler preset's name, or options.

    A name is one of the spec's ``sampler_presets``; a mapping changes options of the model's own
    sampler, or of the sampler preset that the request's ``model`` names, or of the sampler that
    its ``name`` says.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._lock = model, threading.Lock()
        self._spec: dict[str, Any] = model.spec.data
        self._made: OrderedDict[str, Chosen] = OrderedDict()

    def choose(
        self, asked: object, temperature: object, param: str, base: str | None = None
    ) -> Chosen:
        """The sampler for a request; ``base`` is the sampler preset that its options change.

        Raises:
            Refusal: unknown, out of range, or options that do not combine.
        """
        wanted = self._wanted(asked, param, base)
        if temperature is not None:
            wanted = {**wanted, "temperature": number(temperature, 0.0, 2.0, "temperature")}
        key = repr(sorted(wanted.items()))
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            from diffa.build import swap

            try:
                made = Chosen(swap(self._model, sampler=wanted).sampler, key)
            except (DiffaError, TypeError, ValueError, OverflowError) as error:
                raise bad_request(f"{param}: {error}", param) from error
            self._made[key] = made
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return made

    def _wanted(self, asked: object, param: str, base: str | None) -> dict[str, Any]:
        """Options as a spec would give them."""
        sampler_presets: Mapping[str, Any] = self._spec.get("sampler_presets") or {}
        own: dict[str, Any] = self._spec["sampler"] if base is None else sampler_presets[base]
        if asked is None:
            return dict(own)
        if isinstance(asked, str):
            if asked not in sampler_presets:
                raise bad_request(
                    f"{param}: no sampler preset {asked!r}; known: {', '.join(sampler_presets)}",
                    param,
                )
            return dict(sampler_presets[asked])
        if not isinstance(asked, dict):
            raise bad_request(
                f"{param} must be a sampler preset's name or a mapping of options", param
            )
        for key, value in asked.items():
            _check(key, value, f"{param}.{key}")
        kept = own if asked.get("name") in (None, own["name"]) else {}
        return _without_rivals(kept, asked)


def _without_rivals(base: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options asked for over those of ``base``; a rule that is asked for replaces the one
    there, because each decides how many tokens a forward accepts."""
    rules = ("steps", "threshold", "factor", "entropy_bound")
    finer = ("neighbor_threshold", "run_threshold", "kl_threshold")
    kept = dict(base)
    if any(asked.get(rule) is not None for rule in rules):
        kept = {key: value for key, value in kept.items() if key not in (*rules, *finer)}
    return {**kept, **asked}


def _check(key: object, value: object, param: str) -> None:
    if key in CHOICES and isinstance(value, str | bool):
        return
    if not isinstance(key, str) or key not in RANGES:
        known = ", ".join([*RANGES, *CHOICES])
        raise bad_request(f"{param}: not an option that requests may set; known: {known}", param)
    if value is not None:
        number(value, *RANGES[key], param)


def number(value: object, low: float, high: float, param: str) -> float:
    """A number between ``low`` and ``high``, inclusive; raises Refusal."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_request(f"{param} must be a number, got {type(value).__name__}", param)
    if not low <= value <= high:
        raise bad_request(f"{param} must lie between {low:g} and {high:g}", param)
    return value
