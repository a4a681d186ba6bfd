"""Fingerprints of the files and folders that a recipe names: a resumed run needs the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffa.trainers.config import Recipe

_HEAD = 1 << 20  # bytes; of large files in a folder, such as weights, size and head are compared
_FOLDERS = ("checkpoint", "tokenizer", "spec")


def fingerprint_inputs(recipe: Recipe) -> dict[str, str]:
    """Return a fingerprint of every file and checkpoint folder that a recipe names, by its path.

    Args:
        recipe: Any string in it that is the path of a file counts, whatever the option, so the
            options of third-party sources count as well. Folders count under the options
            ``checkpoint``, ``tokenizer`` and ``spec``: names, sizes, and the
            first MiB of each file.
    """
    inputs = {}
    for option, name in _strings(recipe.data, ""):
        try:
            path = recipe.path(name)
            if path.is_file():
                inputs[str(path)] = _file_digest(path)
            elif option in _FOLDERS and path.is_dir():
                inputs[str(path)] = _folder_digest(path)
        except (OSError, ValueError, RuntimeError):  # a text that is no path, such as ~nobody
            continue
    return inputs


def _strings(value: Any, option: str) -> Iterator[tuple[str, str]]:
    """Yield every text in nested mappings and lists with the option that holds it."""
    if isinstance(value, str):
        yield option, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, str(key))
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner, option)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD))
    return digest.hexdigest()
