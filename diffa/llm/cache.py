"""Replies of language models on disk: a run that was stopped pays for no request twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffa.errors import SpecError
from diffa.runtime.files import expand, remove_stale_drafts, write_json
from diffa.runtime.text import parse_json


class ReplyCache:
    """A folder of replies, keyed by everything that decides a reply.

    Several threads and processes may share the folder.

    Raises:
        SpecError: There is a file where the folder should be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = expand(folder)
        if self.folder.is_file():
            raise SpecError(f"{folder} is a file, but replies are kept in a folder: name another")
        for folder in self.folder.glob("*/"):
            remove_stale_drafts(folder)

    def get(self, request: Any) -> dict[str, Any] | None:
        """Return the reply to ``request`` (anything JSON can hold), or None."""
        try:
            reply = parse_json(self._path(request).read_text("utf-8"))
        except (OSError, ValueError):  # no reply yet, or a file that was damaged
            return None
        return reply if isinstance(reply, dict) else None

    def put(self, request: Any, reply: Mapping[str, Any]) -> None:
        """Write a reply, whole or not at all; raises OSError where that cannot be done."""
        write_json(self._path(request), reply, indent=None, sync=False)

    def _path(self, request: Any) -> Path:
        key = json.dumps(request, sort_keys=True)
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.json"
