"""Folders of a run: written beside their place and renamed, so a checkpoint is whole or absent."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from diffa.errors import DiffaError
from diffa.runtime.files import atomic_write, remove_stale_drafts, replace_folder, write_json
from diffa.runtime.text import parse_json

WEIGHTS = "weights.safetensors"
_FILES = "files.json"  # the size of every file of a checkpoint, written last
log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")


class TrainingError(DiffaError):
    """A training cannot start, go on or be saved; says what to do and what is still intact."""


def draft_of(folder: Path) -> Path:
    """Return where a folder is written before it takes its place."""
    return folder.with_name(f".{folder.name}.part")


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left of unfinished checkpoints; the run must be locked."""
    remove_stale_drafts(folder)
    for draft in folder.glob(".checkpoint-*.part"):
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``folder`` once everything is written.

    Whatever goes wrong, ``folder`` is as it was; a write that fails raises TrainingError.
    """
    with _write_errors(folder), replace_folder(folder, draft_of(folder)) as draft:
        yield draft
        sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
        write_json(draft / _FILES, sizes)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Raise a disk's errors as TrainingError, which names the checkpoint that is intact."""
    try:
        yield
    except Exception as error:
        if not _is_write_error(error):
            raise
        raise TrainingError(f"cannot write {path}: {error}{_intact(path)}") from error


def _is_write_error(error: Exception) -> bool:
    """OSError, or what torch and safetensors make of a disk that refuses."""
    text = str(error).lower()
    disk = (
        "no space", "write", "i/o error", "quota", "file too large", "iostream", "enforce fail",
        "unexpected pos",
    )  # fmt: skip
    return isinstance(error, OSError) or any(word in text for word in disk)


def _intact(folder: Path) -> str:
    previous = latest(folder.parent)
    if previous is None:
        return "; nothing was saved before. Free some space or choose another folder"
    return f". {previous} is intact: free some space, then go on with --resume"


def checkpoints(folder: Path) -> list[Path]:
    """Return a stage's complete checkpoints, the oldest first; others are logged."""
    paths = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in paths if _is_complete(p)), key=step_of)


def _is_complete(checkpoint: Path) -> bool:
    """Return whether all files of a checkpoint are there with the size they were written with."""
    try:
        sizes = parse_json((checkpoint / _FILES).read_text())
    except (OSError, ValueError):
        log.warning("%s is incomplete (no %s): it is not used", checkpoint, _FILES)
        return False
    for name, size in sizes.items():
        path = checkpoint / name
        now = path.stat().st_size if path.is_file() else 0
        if now != size:
            log.warning(
                "%s is incomplete (%s has %d of %d bytes): it is not used",
                checkpoint, name, now, size,
            )  # fmt: skip
            return False
    return True


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written at."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise TrainingError(f"{checkpoint} is no checkpoint: their names are checkpoint-STEP")
    return int(match[1])


def latest(folder: Path) -> Path | None:
    """Return a stage's newest checkpoint, or None."""
    paths = checkpoints(folder)
    return paths[-1] if paths else None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors as they are: no rounding, so that a resumed run goes on bit by bit."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path)


def keep_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a file that is whole or as it was; raises TrainingError."""
    with _write_errors(path), atomic_write(path) as draft:
        save_weights(state, draft)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read what ``save_weights`` wrote; raises TrainingError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}): if its stage is to be trained again, remove the "
            "stage's folder"
        ) from error


def save_json(value: Any, path: Path) -> None:
    """Write a small JSON file that is whole or as it was; raises TrainingError."""
    try:
        write_json(path, value)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error}") from error


def load_json(path: Path) -> Any:
    """Read a JSON file of the run, or None where there is none."""
    try:
        return parse_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
