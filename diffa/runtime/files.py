"""Files and folders that appear under their name complete, or not at all."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffa.errors import DiffaError

LOCK = ".diffa.lock"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_HOST = re.sub(r"\W", "-", socket.gethostname())
_TOKEN = secrets.token_hex(4)  # containers start again with the same host name and process ids
_DRAFT = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[\w-]*)@(?P<pid>\d+)-(?P<token>\w+)-\d+\.(?P<kind>part|old)"
)
_LONGEST_WRITE = 24 * 3600  # seconds, after which a draft of any machine is abandoned
_lock_handles: set[int] = set()  # of locks that this process holds


def expand(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` expanded; an unknown ``~user`` stays, as a name of no file."""
    return Path(os.path.expanduser(path))


def temporary_path(path: Path) -> Path:
    """Return a hidden name beside ``path`` that no other thread or process uses."""
    owner = f"{_HOST}@{os.getpid()}-{_TOKEN}-{threading.get_ident()}"
    return path.with_name(f".{path.name}.{owner}.part")


def remove_stale_drafts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of unfinished writes in ``folder``.

    Drafts of other machines count once they are a day old.

    Args:
        folder: Where to look; need not exist.
        name: Only drafts of this file or folder. Default: of any.
    """
    for draft in folder.glob(".*"):
        match = _DRAFT.fullmatch(draft.name)
        if match is None or name not in (None, match["name"]):
            continue
        if _is_abandoned(draft, match):
            if match["kind"] == "old" and not os.path.lexists(folder / match["name"]):
                draft.rename(folder / match["name"])  # killed between the two renames
            else:
                _remove(draft)


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename what was written there at the end.

    Args:
        path: Its folder is made if there is none. An error leaves the file as it was. If it is
            a symbolic link, its target is replaced; pipes and devices are written as they are.
        sync: Flush to disk before the file appears. Caches leave it out: an entry that a power
            failure damages is computed again.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    target = Path(os.path.realpath(path))
    draft = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if sync:
            _flush(draft)
        os.replace(draft, target)
        if sync:
            _flush(target.parent)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        ours = (None, str(draft), draft)
        if isinstance(error, OSError) and error.errno and error.filename in ours:
            error.filename = str(path)  # no user knows the draft
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

    Where the system can exchange two names (Linux), the old or the new folder is there at every
    moment. What killed processes left of earlier writes of ``folder`` is removed first.

    Args:
        folder: An error leaves it as it was. If it is a symbolic link, the folder that it
            points to is replaced.
        draft: Where the new content is written, for processes that write into one folder
            together. Default: a name that is free.
    """
    folder = Path(os.path.realpath(folder))
    remove_stale_drafts(folder.parent, folder.name)
    draft = draft or temporary_path(folder)
    try:
        _remove(draft)
        draft.mkdir(parents=True)
        yield draft
        for path in (*draft.rglob("*"), draft):
            _flush(path)
        if folder.exists():
            _exchange(draft, folder)
        else:
            draft.rename(folder)
        _flush(folder.parent)
    finally:
        _remove(draft)


def is_occupied(folder: Path) -> bool:
    """Return whether there is a file of this name, or a folder with more than a lock in it."""
    if not folder.is_dir():
        return os.path.lexists(folder)
    return any(path.name != LOCK for path in folder.iterdir())


@contextmanager
def locked(folder: Path, work: str, name: str = LOCK) -> Iterator[None]:
    """Hold a folder for this process while it works there; the lock ends with the process.

    Args:
        folder: Made if there is none.
        work: What is done, for the error of another process: "a training".
        name: File of the lock, for processes that share a folder and have parts of their own.

    Raises:
        DiffaError: Another process works in the folder, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # advisory locks are POSIX's
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffaError(f"{folder} cannot be written: {error}") from error
    path = folder / name
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DiffaError(f"{folder} cannot be written: {error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise DiffaError(
                f"{folder} is in use by {holder or 'another process'}: wait for it, or choose "
                "another folder"
            ) from None
        except OSError:  # a file system without locks: work without one
            pass
        # The process before removes its lock file: a lock on a removed file protects nothing.
        if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        os.close(handle)
    _lock_handles.add(handle)
    try:
        with suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(handle, 0)
            os.write(handle, f"{work} (process {os.getpid()} on {_HOST})\n".encode())
        yield
    finally:
        if handle in _lock_handles:  # else this process was forked from the one that holds the lock
            _lock_handles.remove(handle)
            path.unlink(missing_ok=True)
            os.close(handle)


def _release_in_child() -> None:
    """Close the locks of the parent: workers that outlive it must not hold its folders."""
    while _lock_handles:
        os.close(_lock_handles.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _exchange(draft: Path, folder: Path) -> None:
    """Let ``draft`` and ``folder`` change places, in one step if the system has one."""
    if _rename_exchange(draft, folder):
        return
    old = draft.with_suffix(".old")
    _remove(old)
    folder.rename(old)
    try:
        draft.rename(folder)
    except OSError as error:
        try:
            old.rename(folder)
        except OSError:
            raise OSError(error.errno, f"{error.strerror}; the earlier folder is {old}") from error
        raise
    _remove(old)


def _rename_exchange(a: Path, b: Path) -> bool:
    """Exchange two names atomically; return False where the system or the disk cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


@functools.cache
def _renameat2() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None


def _is_abandoned(draft: Path, match: re.Match[str]) -> bool:
    """Return whether no process writes a draft any more."""
    if match["host"] == _HOST:
        own = int(match["pid"]) == os.getpid()
        if match["token"] != _TOKEN if own else not _is_alive(int(match["pid"])):
            return True
    try:
        return time.time() - draft.lstat().st_mtime > _LONGEST_WRITE
    except OSError:  # it was finished meanwhile
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
