"""Files and folders that appear under their name complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def temporary_path(path: Path) -> Path:
    """Return a hidden name beside ``path`` that no other thread or process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename what was written there at the end.

    Args:
        path: Its folder is made if there is none. An error leaves the file as it was.
        sync: Flush to disk before the file appears. Caches leave it out: an entry that a power
            failure damages is computed again.
    """
    draft = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if sync:
            _flush(draft)
        os.replace(draft, path)
        if sync:
            _flush(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, sync: bool = True) -> Path:
    """Write a text file (UTF-8) and return its path."""
    with atomic_write(path, sync=sync) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any, *, indent: int | None = 1, sync: bool = True) -> Path:
    """Write a JSON file and return its path."""
    text = json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
    return write_text(path, text, sync=sync)


@contextmanager
def replace_folder(folder: Path, draft: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` at the end.

    Args:
        folder: An error leaves it as it was.
        draft: Where the new content is written, for processes that write into one folder
            together. Default: a name that is free.
    """
    draft = draft or temporary_path(folder)
    old = draft.with_suffix(".old")
    try:
        for stale in (draft, old):
            shutil.rmtree(stale, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        for path in draft.rglob("*"):
            _flush(path)
        # Folders cannot be exchanged in one call: if the second rename fails, undo the first.
        if folder.exists():
            folder.rename(old)
        try:
            draft.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
