"""Replies of language models, kept on disk: a run that was stopped pays for nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffa.errors import SpecError
from diffa.runtime.files import write_json


class Replies:
    """A folder of replies, each found again by everything that decided it.

    Several threads and processes may share the folder.

    Raises:
        SpecError: there is a file where the folder should be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.is_file():
            raise SpecError(f"{folder} is a file, but replies are kept in a folder: name another")

    def find(self, asked: Any) -> dict[str, Any] | None:
        """Return what was kept for ``asked`` (anything JSON can hold), or None."""
        try:
            kept = json.loads(self._path(asked).read_text("utf-8"))
        except (OSError, ValueError):  # not asked yet, or a disk that was full left a part of it
            return None
        return kept if isinstance(kept, dict) else None

    def keep(self, asked: Any, reply: Mapping[str, Any]) -> None:
        """Keep a reply, whole or not at all; raises OSError where that cannot be done."""
        write_json(self._path(asked), reply, indent=None, sync=False)

    def _path(self, asked: Any) -> Path:
        key = json.dumps(asked, sort_keys=True)
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.json"
