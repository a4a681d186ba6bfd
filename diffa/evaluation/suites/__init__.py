"""The benchmarks, by name: entry points of the group ``diffa.suites``."""

from __future__ import annotations

from pathlib import Path

from diffa.errors import SpecError
from diffa.evaluation.items import Suite
from diffa.spec import registry
from diffa.spec.schema import read_schema


def load_suite(name: str, subset: str = "", path: str | Path | None = None) -> Suite:
    """Return a benchmark by name.

    Args:
        name: Entry point of the group ``diffa.suites``.
        subset: Part of the benchmark; only for voicebench.
        path: File or folder whose name contains the subset, if ``subset`` is empty.

    Raises:
        SpecError: There is no such benchmark or subset.
    """
    suite = registry.load_part("suite", name)
    if "subset" not in read_schema(suite).wires:
        if subset:
            raise SpecError(f"--subset is for voicebench; {name} has none")
        return suite()  # type: ignore[no-any-return]
    if not subset and path is not None:
        from diffa.evaluation.suites.voicebench import subset_from_name

        subset = subset_from_name(Path(path))
        if not subset:
            raise SpecError(f"which part of {name} is {path}? name it with --subset")
    return suite(subset)  # type: ignore[no-any-return]
