"""Files and folders appear whole or stay as they were."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from diffa.runtime import files
from diffa.runtime.files import (
    atomic_write,
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


def test_replace_folder_puts_the_old_folder_back_when_the_new_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model"
    with replace_folder(place) as draft:
        (draft / "a").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="refused"), replace_folder(place) as draft:
        (draft / "a").write_text("new")
    assert (place / "a").read_text() == "old" and names(tmp_path) == ["model"]


def test_replace_folder_clears_what_a_killed_process_left_in_a_shared_draft(
    tmp_path: Path,
) -> None:
    draft = tmp_path / ".model.part"
    (draft / "stale").mkdir(parents=True)
    with replace_folder(tmp_path / "model", draft) as given:
        assert given == draft and names(draft) == []
        (draft / "a").write_text("new")
    assert names(tmp_path / "model") == ["a"] and names(tmp_path) == ["model"]
