"""Import modules on the CPU, whatever torch's default device is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch


@contextmanager
def imports_on_cpu() -> Iterator[None]:
    """Execute the modules that are imported meanwhile with the CPU as torch's default device.

    Parts import their libraries in their constructors. Under ``torch.device("meta")`` a library's
    module-level tensors (such as ``torchaudio.compliance.kaldi.EPSILON``) would have no data, and
    every later use of it in the process would fail.
    """
    finder = _CPUFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _CPUFinder(MetaPathFinder):
    """Find modules with the other finders; make their loaders execute them on the CPU."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Threads may each have a finder here: they must not ask one another.
        others = [finder for finder in sys.meta_path if not isinstance(finder, _CPUFinder)]
        for finder in others:
            spec: ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None:
                _execute_on_cpu(spec)
                return spec
        return None


def _execute_on_cpu(spec: ModuleSpec) -> None:
    loader = spec.loader
    if loader is None or isinstance(loader, type):  # built-in modules share a class as loader
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        with torch.device("cpu"):
            execute(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]
