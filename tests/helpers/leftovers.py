"""Names of the unfinished writes that a killed process leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from diffa.runtime import files


def dead_process() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(path: Path, kind: str = "part") -> Path:
    """Return the draft of ``path`` that a killed process leaves behind."""
    return path.with_name(f".{path.name}.{files._HOST}@{dead_process()}-0-1.{kind}")
