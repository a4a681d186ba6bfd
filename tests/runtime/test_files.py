"""Files and folders appear whole or stay as they were."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.leftovers import leftover

from diffa.errors import DiffaError
from diffa.runtime import files
from diffa.runtime.files import (
    atomic_write,
    is_occupied,
    locked,
    remove_stale_drafts,
    replace_folder,
    temporary_path,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    with atomic_write(path) as draft:
        assert draft.parent == path.parent and draft.name.startswith(".")
        draft.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and names(path.parent) == ["c.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_when_interrupted(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = write_text(tmp_path / "a", "old")
    with pytest.raises(error), atomic_write(path) as draft:
        draft.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_atomic_write_fails_when_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_written_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_text(tmp_path / "a", "text")
        with replace_folder(tmp_path / "folder") as draft:
            (draft / "b").write_text("text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_file_and_folder_are_flushed_unless_sync_is_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "_flush", flushed.append)
    write_text(tmp_path / "cached", "text", sync=False)
    assert flushed == []
    write_text(tmp_path / "a", "text")
    assert flushed == [temporary_path(tmp_path / "a"), tmp_path]


def test_threads_writing_one_file_leave_one_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "a"
    texts = [str(number) * 50_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and names(tmp_path) == ["a"]


def test_json_is_written_in_unicode_and_on_one_line_without_indent(tmp_path: Path) -> None:
    value = {"text": "Grüße", "numbers": [1, 2.5]}
    pretty = write_json(tmp_path / "a.json", value)
    compact = write_json(tmp_path / "b.json", value, indent=None)
    assert compact.read_text("utf-8") == '{"text": "Grüße", "numbers": [1, 2.5]}\n'
    assert json.loads(pretty.read_text("utf-8")) == value
    assert len(pretty.read_text("utf-8").splitlines()) == 7


def test_replace_folder_swaps_in_the_new_content_alone(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    for name in ("first", "second"):
        with replace_folder(place) as draft:
            (draft / "sub").mkdir()
            (draft / "sub" / name).write_text(name)
    assert names(place / "sub") == ["second"] and names(place.parent) == ["model"]


def test_replace_folder_keeps_the_old_content_on_an_error(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with replace_folder(place) as draft:
        (draft / "a").write_text("old")
    with pytest.raises(ValueError, match="stop"), replace_folder(place) as draft:
        (draft / "a").write_text("half")
        raise ValueError("stop")
    assert (place / "a").read_text() == "old" and names(tmp_path) == ["model"]


def old_folder(tmp_path: Path) -> Path:
    """Write a folder that the test then tries to replace."""
    place = tmp_path / "model"
    with replace_folder(place) as draft:
        (draft / "a").write_text("old")
    return place


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    elif files._renameat2() is None:
        pytest.skip("this system cannot exchange two names")
    return str(request.param)


def test_replacing_a_folder_takes_its_name_and_leaves_nothing_else(
    tmp_path: Path, renaming: str
) -> None:
    place = tmp_path / "model"
    for name in ("first", "second"):
        with replace_folder(place) as draft:
            (draft / name).write_text(name)
    assert names(place) == ["second"] and names(tmp_path) == ["model"]


def test_the_old_folder_returns_when_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_renameat2", lambda: None)
    place = old_folder(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="refused"), replace_folder(place) as draft:
        (draft / "a").write_text("new")
    assert (place / "a").read_text() == "old" and names(tmp_path) == ["model"]


def test_an_error_names_the_copy_that_could_not_be_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_renameat2", lambda: None)
    place = old_folder(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == place:
            raise OSError(5, "refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match=r"the earlier folder is .*\.old"), replace_folder(place):
        pass
    (copy,) = tmp_path.iterdir()
    assert (copy / "a").read_text() == "old"


def test_an_exchange_leaves_no_moment_without_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if files._renameat2() is None:
        pytest.skip("this system cannot exchange two names")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the folder was moved away"))
    (tmp_path / "model").mkdir()
    with replace_folder(tmp_path / "model") as draft:
        (draft / "a").write_text("new")
    assert names(tmp_path / "model") == ["a"]


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")  # dangling at first
    for text in ("old", "new"):
        with replace_folder(tmp_path / "link") as draft:
            (draft / "a").write_text(text)
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["disk", "link"]
    assert (tmp_path / "disk" / "model" / "a").read_text() == "new"
    assert names(tmp_path / "disk") == ["model"]


def test_drafts_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    (leftover(tmp_path / "model") / "sub").mkdir(parents=True)
    leftover(tmp_path / "other.json").write_text("half")
    alive = temporary_path(tmp_path / "model")
    alive.mkdir()
    foreign = tmp_path / ".model.elsewhere@1-0-1.part"
    foreign.write_text("of another machine")
    remove_stale_drafts(tmp_path, "model")
    assert len(names(tmp_path)) == 3
    remove_stale_drafts(tmp_path)
    assert names(tmp_path) == sorted([alive.name, foreign.name])


def test_a_folder_lost_between_two_renames_is_put_back(tmp_path: Path) -> None:
    old = leftover(tmp_path / "model", "old")
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(ValueError), replace_folder(tmp_path / "model"):
        raise ValueError
    assert (tmp_path / "model" / "a").read_text() == "old" and names(tmp_path) == ["model"]


def test_a_lock_refuses_others_until_it_is_released(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run", "diffa map"),
        pytest.raises(DiffaError, match=r"run is in use by diffa map \(process \d+ on .*another"),
        locked(tmp_path / "run", "diffa map"),
    ):
        pass
    with locked(tmp_path / "run", "diffa train"), locked(tmp_path / "run", "x", name=".b.lock"):
        assert is_occupied(tmp_path / "run")
    assert names(tmp_path / "run") == [] and not is_occupied(tmp_path / "run")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from diffa.runtime.files import locked\n"
        "with locked(Path(sys.argv[1]), 'work'): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert names(tmp_path) == [files.LOCK]
    with locked(tmp_path, "work"):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiffaError, match="cannot be written"), locked(tmp_path / "file", "work"):
        pass


def test_replace_folder_clears_what_a_killed_process_left_in_a_shared_draft(
    tmp_path: Path,
) -> None:
    draft = tmp_path / ".model.part"
    (draft / "stale").mkdir(parents=True)
    with replace_folder(tmp_path / "model", draft) as given:
        assert given == draft and names(draft) == []
        (draft / "a").write_text("new")
    assert names(tmp_path / "model") == ["a"] and names(tmp_path) == ["model"]


def test_the_target_of_a_linked_file_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "rows")  # dangling at first
    for text in ("old", "new"):
        write_text(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["disk", "link"]
    assert (tmp_path / "disk" / "rows").read_text() == "new"


def test_pipes_are_written_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 10) == b"text" and pipe.is_fifo()
    os.close(reader)


def test_errors_of_the_disk_name_the_file_and_not_its_draft(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "rows"):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == f"[Errno 28] No space left on device: '{tmp_path / 'rows'}'"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_ends_with_its_process_although_a_forked_worker_lives_on(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from diffa.runtime.files import locked\n"
        "with locked(Path(sys.argv[1]), 'work'):\n"
        "    if not os.fork(): print(os.getpid(), flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    with locked(tmp_path, "work"):
        os.kill(worker, 9)
    process.stdout.close()


def test_a_lock_needs_no_space_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path, "work"), pytest.raises(DiffaError, match="in use by another process"):
        locked(tmp_path, "work").__enter__()
    assert names(tmp_path) == []


def test_drafts_of_an_earlier_process_with_the_same_number_are_removed(tmp_path: Path) -> None:
    own = temporary_path(tmp_path / "model")
    own.mkdir()
    earlier = own.with_name(own.name.replace(files._TOKEN, "0"))  # a container that began again
    earlier.mkdir()
    remove_stale_drafts(tmp_path)
    assert names(tmp_path) == [own.name]


def test_day_old_drafts_of_other_machines_are_removed(tmp_path: Path) -> None:
    young, old = (tmp_path / f".m.elsewhere@1-0-{n}.part" for n in (1, 2))
    for draft in (young, old):
        draft.write_text("half")
    os.utime(old, (0, 0))
    remove_stale_drafts(tmp_path)
    assert names(tmp_path) == [young.name]


def test_an_unknown_user_is_a_missing_file_in_every_reader():
    """``Path.expanduser`` raises RuntimeError for it, which no caller expects."""
    from diffa.data.manifest import Manifest
    from diffa.evaluation.records import load_run
    from diffa.runtime.files import expand
    from diffa.trainers.config import Recipe

    name = "~nobody-of-this-name/file"
    assert expand(name) == Path(name)
    for read, suffix in ((Manifest, ".jsonl"), (Recipe.read, ".yaml"), (load_run, "")):
        with pytest.raises(DiffaError, match="nobody-of-this-name"):
            read(name + suffix)
