"""Fingerprints of the files and folders that a recipe names: a resumed run needs the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffa.trainers.checkpoints import TrainingError, load_json, save_json
from diffa.trainers.config import Recipe

_HEAD = 1 << 20  # bytes; of large files in a folder, such as weights, size and head are compared
_FOLDERS = ("checkpoint", "tokenizer", "spec", "fsdd")
_FILE = "inputs.json"


def claim_inputs(folder: Path, recipe: Recipe, *, resumed: bool = True) -> None:
    """Write the fingerprints of a recipe's inputs to the folder of a run.

    Raises:
        TrainingError: The folder has other fingerprints of them, and ``resumed`` is true.
    """
    inputs, earlier = fingerprint_inputs(recipe), load_json(folder / _FILE) if resumed else None
    changed = [k for k, digest in (earlier or {}).items() if inputs.get(k, digest) != digest]
    if changed:
        raise TrainingError(
            f"{', '.join(changed[:4])} changed since the run in {folder} began: restore what it "
            "was, or choose another --out"
        )
    save_json({**(earlier or {}), **inputs}, folder / _FILE)


def fingerprint_inputs(recipe: Recipe) -> dict[str, str]:
    """Return a fingerprint of every file and checkpoint folder that a recipe names, by its name.

    Args:
        recipe: Any string in it that is the path of a file counts, whatever the option, so the
            options of third-party sources count as well. Folders count under the options
            ``checkpoint``, ``tokenizer``, ``spec`` and ``fsdd``: names, sizes, and the first MiB
            of each file. A spec that the recipe names is searched as well.
    """
    inputs = {}
    places = [(*place, recipe.path) for place in _strings(recipe.data, "")]
    places += [(*place, Path) for place in _strings(recipe.spec.data, "")]
    for option, name, locate in places:
        try:
            path = locate(name)
            if path.is_file():
                inputs[name] = _file_digest(path)
            elif option in _FOLDERS and path.is_dir():
                inputs[name] = _folder_digest(path)
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
