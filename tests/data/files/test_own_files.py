import os
import stat
from pathlib import Path

import pytest

from data.files.own import open_to_append, open_to_read, set_aside, write_atomically


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.write_text("precious")
    link.symlink_to(theirs)
    with pytest.raises(OSError, match="is a link"):
        open_to_append(link)
    write_atomically(link, "ours")
    assert (theirs.read_text(), link.read_text(), link.is_symlink()) == ("precious", "ours", False)


def test_a_link_with_no_target_is_not_created_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "created")
    with pytest.raises(OSError, match="is a link"):
        open_to_append(tmp_path / "link")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("opens", [open_to_read, open_to_append])
def test_a_pipe_or_a_folder_is_refused_at_once(tmp_path: Path, opens) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match=r"no regular file|No such device"):
        opens(tmp_path / "fifo")
    with pytest.raises(IsADirectoryError):
        opens(tmp_path)
    with pytest.raises(OSError, match="no regular file"):
        opens("/dev/null")


def test_reading_follows_links(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with open_to_read(tmp_path / "link") as file:
        assert file.read() == b"x"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "private", "x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_what_is_appended_can_be_read_and_truncated(tmp_path: Path) -> None:
    with open_to_append(tmp_path / "file") as file:
        file.write(b"one\ntwo\n")
        file.truncate(4)
        file.write(b"three\n")
        file.seek(0)
        assert file.read() == b"one\nthree\n"


@pytest.mark.parametrize("can_link", [True, False])
def test_what_is_set_aside_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool) -> None:
    if not can_link:
        monkeypatch.setattr(os, "link", fails)
    file, folder, pipe, link = (tmp_path / name for name in ("file", "folder", "pipe", "link"))
    (tmp_path / "file.damaged").write_text("earlier")
    (tmp_path / "file.damaged.2").symlink_to(tmp_path / "nothing")
    for content in ("first", "second"):
        file.write_text(content)
        assert set_aside(file, leave=content == "second").read_text() == content
    assert {path.name for path in tmp_path.glob("file.*")} == {f"file.damaged{n}" for n in ("", ".2", ".3", ".4")}
    assert (tmp_path / "file.damaged").read_text() == "earlier" and file.read_text() == "second"
    folder.mkdir()
    (folder / "inside").touch()
    os.mkfifo(pipe)
    link.symlink_to("/somewhere")
    for each in (folder, pipe, link):
        assert set_aside(each).name == f"{each.name}.damaged" and not os.path.lexists(each)
    assert (tmp_path / "folder.damaged" / "inside").exists() and os.readlink(tmp_path / "link.damaged") == "/somewhere"


def fails(*args: object, **options: object) -> None:
    raise PermissionError("no hard links here")
