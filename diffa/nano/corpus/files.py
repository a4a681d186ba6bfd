"""Folders of generated recordings: complete, or as they were; never two corpora in one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffa.data.samples import DataError
from diffa.data.tables import TABLE_SUFFIXES
from diffa.runtime.files import locked, replace_folder, write_json
from diffa.runtime.text import parse_json


@contextmanager
def corpus_folder(folder: Path, manifest: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder for recordings, which becomes ``audio/NAME`` of ``folder``.

    The caller writes the manifest after this block. It is the last file to appear, so a corpus
    with a manifest is complete; without one it is written again from the beginning.

    Args:
        folder: Folder of the corpus; several splits may share it.
        manifest: File name of the manifest; NAME is its stem.
        options: What the corpus follows from. Equal options give equal bytes.

    Raises:
        DataError: The folder holds a corpus of other options under this name, or cannot be
            written.
    """
    name = Path(manifest).stem
    about, audio = folder / f"{name}.corpus.json", folder / "audio" / name
    value = json.loads(json.dumps(options))
    try:
        with locked(folder, f"writing the corpus {name}"):
            if _load(about) != value:
                manifests = (folder / f"{name}{suffix}" for suffix in TABLE_SUFFIXES)
                _refuse(path for path in (*manifests, audio) if os.path.lexists(path))
            write_json(about, value)
            with replace_folder(audio) as draft:
                yield draft
                files = sorted(audio.rglob("*"))  # all of them ours, or nothing is replaced
                _refuse(path for path in files if not (draft / path.relative_to(audio)).exists())
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}; nothing was changed") from error


def _refuse(paths: Iterable[Path]) -> None:
    """Raise DataError for the first of the paths, which belongs to something else."""
    if (path := next(iter(paths), None)) is not None:
        raise DataError(
            f"{path} belongs to another corpus: choose another folder, or remove that corpus"
        )


def _load(about: Path) -> Any:
    try:
        return parse_json(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
