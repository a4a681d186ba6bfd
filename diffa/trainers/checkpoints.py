"""Folders of a run: written beside their place and renamed, so a checkpoint is whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from diffa.errors import DiffaError

WEIGHTS = "weights.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


class TrainingError(DiffaError):
    """A training cannot start, go on or be saved; says what to do and what is still intact."""


def draft_of(folder: Path) -> Path:
    """Return where a folder is written before it takes its place."""
    return folder.with_name(f".{folder.name}.part")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``folder`` once everything is written.

    Whatever goes wrong, ``folder`` is as it was; a write that fails raises TrainingError.
    """
    draft = draft_of(folder)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        for path in draft.rglob("*"):
            _flush(path)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not _is_write_error(error):
            raise
        raise TrainingError(f"cannot write {folder}: {error}{_intact(folder)}") from error


def _is_write_error(error: Exception) -> bool:
    """OSError, or what torch and safetensors make of a disk that refuses."""
    text = str(error).lower()
    disk = ("no space", "write", "i/o error", "quota", "file too large", "iostream")
    return isinstance(error, OSError) or any(word in text for word in disk)


def _intact(folder: Path) -> str:
    found = latest(folder.parent)
    if found is None:
        return "; nothing was saved before. Free some space or choose another folder"
    return f". {found} is intact: free some space, then go on with --resume"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """Return a stage's whole checkpoints, the oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    whole = [p for p in found if (p / WEIGHTS).is_file() and (p / "trainer_state.json").is_file()]
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written at."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise TrainingError(f"{checkpoint} is no checkpoint: their names are checkpoint-STEP")
    return int(match[1])


def latest(folder: Path) -> Path | None:
    """Return a stage's newest checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


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
    draft = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(state, draft)
        _flush(draft)
        os.replace(draft, path)
    except Exception as error:
        draft.unlink(missing_ok=True)
        if not _is_write_error(error):
            raise
        raise TrainingError(f"cannot write {path}: {error}{_intact(path)}") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read what ``save_weights`` wrote; raises TrainingError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error


def write_json(value: Any, path: Path) -> None:
    """Write a small JSON file so that it is never half there."""
    draft = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(draft, path)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of the run, or None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
