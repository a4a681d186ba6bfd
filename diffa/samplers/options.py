"""Range checks of sampler options; each error names the option and its value."""

from __future__ import annotations

from diffa.errors import SpecError


def check_at_least(least: int, **options: int | None) -> None:
    """Raise SpecError for an option below ``least``; None stands for a default."""
    for name, value in options.items():
        if value is not None and value < least:
            raise SpecError(f"{name} must be at least {least}, got {value}")


def check_shares(**options: float | None) -> None:
    """Raise SpecError for an option outside 0 to 1; None stands for a default."""
    for name, value in options.items():
        if value is not None and not 0 <= value <= 1:
            raise SpecError(f"{name} must lie between 0 and 1, got {value}")


def check_non_negative(**options: float | None) -> None:
    """Raise SpecError for an option that is negative, infinite or not a number."""
    for name, value in options.items():
        if value is not None and not 0 <= value < float("inf"):
            raise SpecError(f"{name} must be 0 or more, got {value}")
