"""Memory of the process."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def release_free_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    It keeps what a thread has freed for that thread: hundreds of MiB after a long recording.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
