"""Rows of a run: cut back where it resumes, and never lost without a word."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.run import names, rows
from train.run.journal import DAMAGED_FILE, Journal
from train.run.reader import RunReader, read_rows, read_rows_from_the_end
from train.run.rows import JsonLines, Prefix


def written(path: Path, last_step: int, first: int = 1) -> Prefix:
    """Write steps first to last_step, and return the prefix at the last of them."""
    file = JsonLines(path, first - 1)
    for step in range(first, last_step + 1):
        file.write({"step": step, "loss": 1 / step})
    prefix = file.prefix()
    file.close()
    return prefix


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


def test_what_follows_the_checkpoint_is_cut_off_and_the_rest_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / names.METRICS
    prefix, inode = written(path, 4), path.stat().st_ino
    more = JsonLines(path, 4, [prefix])
    for row in ({"step": 4, "validation_loss": 2.0}, {"step": 5}, {"step": 6}):
        more.write(row)
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    resumed = JsonLines(path, 4, [prefix])
    assert resumed.damage is None and steps(path) == [1, 2, 3, 4, 4], "an evaluation after the save stays"
    assert path.stat().st_ino == inode and os.listdir(tmp_path) == [names.METRICS]
    assert resumed.prefix() == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("last_step", [0, 3, 9])
def test_a_checkpoint_that_recorded_nothing_keeps_the_rows_up_to_its_step(tmp_path: Path, last_step: int) -> None:
    path = tmp_path / names.METRICS
    written(path, 9)
    assert JsonLines(path, last_step).damage is None
    assert steps(path) == list(range(1, last_step + 1)) and os.listdir(tmp_path) == [names.METRICS]


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "a digit of a loss": lambda content: flip(content, content.index(b"0.5")),
    "a digit of a step": lambda content: content.replace(b'"step": 2', b'"step": 6'),
    "a brace": lambda content: content.replace(b'{"step": 3', b'["step": 3'),
    "zeros": lambda content: content[:40] + bytes(40) + content[80:],
    "a line removed": lambda content: b"".join(content.splitlines(True)[1:]),
    "lines swapped": lambda content: b"".join(reversed(content.splitlines(True))),
    "no line ends": lambda content: content.replace(b"\n", b" "),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told_and_the_original_kept_whole(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path, aside = tmp_path / names.METRICS, tmp_path / f"{names.METRICS}.damaged"
    prefix = written(path, 8)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    aside.write_text("of an earlier damage")
    resumed = JsonLines(path, 8, [prefix])
    assert resumed.damage is not None and resumed.damage.kept_as == f"{aside.name}.2"
    assert (tmp_path / resumed.damage.kept_as).read_bytes() == damaged and aside.read_text() == "of an earlier damage"
    assert set(path.read_bytes().splitlines()) <= set(damaged.splitlines())
    resumed.write({"step": 9})
    assert steps(path)[-1] == 9 and len(steps(path)) == len([row for row in damaged.splitlines() if is_row(row)]) + 1


def is_row(line: bytes) -> bool:
    try:
        return json.loads(line)["step"] <= 8
    except (ValueError, TypeError):
        return False


@pytest.mark.parametrize("name", ["a brace", "zeros", "a digit of a step"])
def test_damage_inside_is_seen_without_a_record_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / names.METRICS
    written(path, 8)
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    resumed = JsonLines(path, 5)
    assert resumed.damage is not None and (tmp_path / str(resumed.damage.kept_as)).exists()
    assert 5 in steps(path) and max(steps(path)) <= 5


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    resumed = JsonLines(tmp_path / names.METRICS, 8, [{"bytes": 100, "sha256": "0"}])
    assert "is missing, but the checkpoint has recorded 100 bytes" in str(resumed.damage)
    assert os.listdir(tmp_path) == [names.METRICS]


def test_a_damage_is_told_once_however_often_the_run_resumes_there(tmp_path: Path) -> None:
    path, journal = tmp_path / names.METRICS, Journal(tmp_path)
    prefix = written(path, 8)
    path.write_bytes(DAMAGES["zeros"](path.read_bytes()))
    resumed = JsonLines(path, 8, [prefix])
    assert resumed.damage is not None
    journal.tell(resumed.damage, 8)
    for _ in range(3):
        again = JsonLines(path, 8, [prefix, *journal.mended(names.METRICS, 8)])
        assert again.damage is None
        again.write({"step": 9})
    assert list(journal.mended(names.METRICS, 4)) == [] == list(journal.mended(names.ENTROPY, 8))


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("name", [names.METRICS, names.JOURNAL])
def test_a_file_that_is_removed_or_replaced_while_it_is_written_is_put_back(
    tmp_path: Path, name: str, replaced: bool
) -> None:
    path = tmp_path / name
    file: Any = Journal(tmp_path) if name == names.JOURNAL else JsonLines(path, 0)
    write = (
        (lambda step: file.write("saved", step=step)) if name == names.JOURNAL else lambda s: file.write({"step": s})
    )
    for step in range(3):
        write(step)
    assert file.restore() is None
    path.unlink()
    if replaced:
        path.write_text("of somebody else")
    write(3)
    damage = file.restore()
    assert damage is not None and "restored" in damage.fault and file.restore() is None
    write(4)
    assert steps(path) == [0, 1, 2, 3, 4]
    assert damage.kept_as == (f"{name}.damaged" if replaced else None)
    assert not replaced or (tmp_path / f"{name}.damaged").read_text() == "of somebody else"
    assert file.prefix() == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("size", [10, 10**4])
def test_a_file_that_somebody_else_writes_to_is_told_once(tmp_path: Path, size: int) -> None:
    file = JsonLines(tmp_path / names.METRICS, 0)
    file.write({"step": 1, "loss": 1.0})
    os.truncate(file.path, size)
    assert "somebody else wrote to it" in str(file.restore()) and file.restore() is None


def test_a_folder_in_the_place_of_a_file_is_moved_aside(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / names.METRICS, 0)
    file.write({"step": 1})
    file.path.unlink()
    (file.path / "inside").mkdir(parents=True)
    damage = file.restore()
    assert damage is not None and (tmp_path / str(damage.kept_as) / "inside").is_dir() and steps(file.path) == [1]


def test_a_full_disk_leaves_no_part_of_a_row_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = JsonLines(tmp_path / names.METRICS, 0)
    file.write({"step": 1})
    write = os.write

    def fills_up(descriptor: int, content: memoryview) -> int:
        if len(content) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[:-9])

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as error:
        patch.setattr(rows.os, "write", fills_up)
        file.write({"step": 2, "loss": 1.0})
    assert error.value.filename == str(file.path)
    file.write({"step": 2})
    assert file.path.read_bytes().count(b"\n") == 2 and steps(file.path) == [1, 2]


def test_links_and_pipes_are_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / names.METRICS).symlink_to(tmp_path / "theirs")
    os.mkfifo(tmp_path / names.JOURNAL)
    with pytest.raises(OSError, match="is a link"):
        JsonLines(tmp_path / names.METRICS, 0)
    with pytest.raises(OSError, match="no regular file"):
        Journal(tmp_path)
    assert (tmp_path / "theirs").read_text() == "precious"


def test_a_journal_that_was_cut_or_damaged_is_told_once_and_stays(tmp_path: Path) -> None:
    path, journal = tmp_path / names.JOURNAL, Journal(tmp_path)
    for step in range(5):
        journal.write("saved", step=step)
    recorded = journal.prefix()
    journal.write("stopped", step=5)
    assert Journal(tmp_path, recorded).damage is None and Journal(tmp_path).damage is None
    whole = path.read_bytes()
    for damaged in (
        whole[:-3],
        whole.replace(b'"saved", "step": 3', b'"saved, "step": 3'),
        flip(whole, 30),
        whole[:99],
    ):
        path.write_bytes(damaged)
        for record in (recorded, recorded, None):
            opened = Journal(tmp_path, record)
            if opened.damage is not None:
                opened.tell(opened.damage, 4)
            opened.close()
        assert path.read_bytes().startswith(damaged)
        told = [row for row in RunReader(tmp_path).journal() if row["event"] == DAMAGED_FILE]
        assert len(told) == 1, told


def test_rows_are_read_from_the_end_as_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / names.METRICS
    written(path, 40)
    with path.open("ab") as file:
        file.write(b'damaged\n\xff\n\n{"step": 41}')
    for piece in (1, 7, 64, 1 << 20):
        monkeypatch.setattr("train.run.reader.PIECE_BYTES", piece)
        assert list(read_rows_from_the_end(path)) == read_rows(path)[::-1] and len(read_rows(path)) == 41
    path.write_bytes(b"")
    assert list(read_rows_from_the_end(path)) == list(read_rows_from_the_end(tmp_path / "none")) == []


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Resume a file of 120 MB, half of it one line, in a process that may use 70 MB more than at its start."""
    path = tmp_path / names.METRICS
    prefix = written(path, 3)
    with path.open("ab") as file:
        for _ in range(60):
            file.write(b'{"step": 4, "x": "' + b"x" * 1_000_000 + b'"}\n')
        file.write(b"x" * 60_000_000)
    code = """if True:
        import json, resource, sys
        from pathlib import Path
        from train.run.reader import read_rows_from_the_end
        from train.run.rows import JsonLines
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 70_000_000
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        path, prefix = Path(sys.argv[1]), json.loads(sys.argv[2])
        assert sum(1 for _ in read_rows_from_the_end(path)) == 63
        assert JsonLines(path, 4, [prefix]).damage is None
        assert JsonLines(path, 4, [{**prefix, "sha256": "0"}]).damage
        assert JsonLines(path, 3).damage is None
    """
    arguments = [sys.executable, "-c", code, str(path), json.dumps(prefix)]
    subprocess.run(arguments, check=True, cwd=Path(__file__).parents[3], timeout=120)
    assert steps(path) == [1, 2, 3]
