"""Whose checkpoints lie in a folder or store: nothing of anybody else's is deleted, overwritten or resumed."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from train.checkpoint.folder import DamagedFileError, Folder, read_marker, write_marker
from train.checkpoint.load import check_owner, steps_saved
from train.checkpoint.root import CheckpointError, OwnedRoot, claim
from train.checkpoint.saver import prune
from train.config import Config, config_from_dict
from train.run.directory import RunDirectory, recorded_run_id
from train.run.lock import LockLostError
from train.run.names import checkpoint_name

FILES = ["rank_00000_000.bin", "rank_00001_000.bin", "tensors.json"]
OTHERS = [
    "step_by_step_notes/plan.md",
    "step_list.txt",
    "step_00000007/data.csv",
    "writable",
    "step_00000008.bak/x",
    "step_9/x",
    "step_0000000\uff19/x",
    "step_00000011",
    "step_00000012.tmp/rank_00000_000.bin",
    "doctor_00000/x",
]


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(params=["disk", "store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    yield Folder(f"{tmp_path}/root" if request.param == "disk" else f"memory://{uuid4().hex}/root")


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """What a test opens, closed at its end."""
    found: list[Any] = []
    yield found
    for each in reversed(found):
        each.close()


def directory(path: Path, opened: list[Any]) -> RunDirectory:
    opened.append(RunDirectory(path, Config(run_dir=str(path))))
    return opened[-1]


def claimed(root: Folder, run_dir: Path, opened: list[Any]) -> OwnedRoot:
    opened.append(claim(root, directory(run_dir, opened)))
    return opened[-1]


def close(opened: list[Any]) -> None:
    while opened:
        opened.pop().close()


def put(root: Folder, path: str, content: bytes = b"x") -> None:
    folder, _, name = f"{root.address}/{path}".rpartition("/")
    Folder(folder).make()
    with Folder(folder).fs.open(f"{Folder(folder).path}/{name}", "wb") as file:
        file.write(content)


def everything(root: Folder) -> set[str]:
    return {file.removeprefix(root.path).lstrip("/") for file in root.fs.find(root.path)}


def save(owned: OwnedRoot, step: int, **fields: Any) -> str:
    owned.begin(name := checkpoint_name(step))
    fill(owned.root.child(name), step, run_id=owned.run_id, **fields)
    return name


def fill(folder: Folder, step: int, **fields: Any) -> None:
    """Write the files of a checkpoint; without run_id, as earlier versions did."""
    folder.make()
    for name in FILES:
        with folder.writing(name) as file:
            file.write(b"x")
    known = {"format": 3, "step": step, "adam_step": 1, "data_state": {}, "config": {}, "dataset": {}, "files": {}}
    write_marker(folder, {**known, **fields})


def keeping(**checkpoint: Any) -> Config:
    return config_from_dict({"checkpoint": checkpoint, "training": {"train_steps": 40}})


def test_pruning_deletes_this_runs_checkpoints_alone(root: Folder) -> None:
    owned = OwnedRoot(root, "mine")
    for path in OTHERS:
        put(root, path)
    fill(root.child(checkpoint_name(3)), 3, run_id="another")
    before = everything(root)
    for step in (10, 20, 30):
        save(owned, step)
    left = prune(owned, keeping(keep=1, keep_best=False), 30)
    assert steps_saved(root) == [3, 30]
    assert before <= everything(root) and len(everything(root) - before) == len(FILES) + 2
    assert left == ["step_00000003", "step_00000007", "step_00000011"]


def test_another_file_in_a_checkpoint_stays_and_the_next_save_there_goes_well(root: Folder) -> None:
    owned = OwnedRoot(root, "mine")
    for path in ("step_00000005/notes.txt", "step_00000005/rank_0.bin", "step_00000005/folder/checkpoint.json"):
        put(root, path)
        if path.endswith("notes.txt"):
            put(root, "step_00000005/run.json", b'{"run_id": "mine"}')
    save(owned, 5)
    assert owned.discard("step_00000005") == [f"step_00000005/{name}" for name in ("folder", "notes.txt", "rank_0.bin")]
    assert steps_saved(root) == [] and len(everything(root)) == 4
    save(owned, 5)
    assert steps_saved(root) == [5]


@pytest.mark.parametrize("there", ["data.csv", "rank_00000_000.bin", "run.json"])
def test_a_folder_that_the_run_has_not_written_is_not_saved_over(root: Folder, there: str) -> None:
    owned = OwnedRoot(root, "mine")
    put(root, f"step_00000006/{there}", b'{"run_id": "another"}')
    before = everything(root)
    with pytest.raises(CheckpointError, match="step_00000006: is there already, and this run has not written it; move"):
        owned.begin("step_00000006")
    with pytest.raises(CheckpointError, match="step_00000006: is there already"):
        owned.in_the_way(0, lambda step: step % 6 == 0)
    assert owned.in_the_way(0, lambda step: step == 12) == ["step_00000006"] and owned.in_the_way(6, bool) == []
    assert everything(root) == before


def test_what_an_earlier_version_saved_is_pruned_and_what_it_left_unfinished_is_not(root: Folder) -> None:
    owned = OwnedRoot(root, "mine")
    fill(root.child(checkpoint_name(1)), 1)
    put(root, "step_00000002/rank_00000_000.bin")
    save(owned, 3)
    assert prune(owned, keeping(keep=1, keep_best=False), 3) == ["step_00000002"]
    assert steps_saved(root) == [3] and "step_00000002/rank_00000_000.bin" in everything(root)


def test_a_deletion_or_a_start_of_a_save_that_is_interrupted_goes_on(
    root: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each change; a checkpoint of an earlier version among them, and one whose marker is damaged."""
    remove, create = Folder.remove_file, Folder.create
    for changes in range(12):
        owned = OwnedRoot(root, "mine")
        save(owned, 1)
        fill(root.child(checkpoint_name(2)), 2)
        put(root, f"{save(owned, 3)}/checkpoint.json", b"damaged")
        left = iter(range(changes))

        def counted(function: Any, *args: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            function(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "remove_file", lambda *args: counted(remove, *args))
            patch.setattr(Folder, "create", lambda *args: counted(create, *args))
            try:
                owned.discard_all()
            except KeyboardInterrupt:
                assert all(
                    set(FILES) <= root.child(checkpoint_name(step)).entries().keys() for step in steps_saved(root)
                )
        assert OwnedRoot(root, "mine").discard_all() == [] and everything(root) == set()


def test_an_empty_mark_that_a_crash_left_is_no_obstacle(root: Folder) -> None:
    put(root, "step_00000001/run.json", b"")
    owned = OwnedRoot(root, "mine")
    save(owned, 1)
    assert owned.discard("step_00000001") == [] and everything(root) == set()


def test_links_and_folders_in_place_of_a_checkpoints_files_are_left(tmp_path: Path) -> None:
    root, other = Folder(str(tmp_path / "root")), tmp_path / "other"
    OwnedRoot(root, "mine")
    fill(Folder(str(other)), 1, run_id="mine")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / checkpoint_name(1)).symlink_to(other)
    owned = OwnedRoot(root, "mine")
    assert owned.discard_all() == [checkpoint_name(1)] and len(list(other.iterdir())) == len(FILES) + 1
    save(owned, 2)
    file = tmp_path / "root" / checkpoint_name(2) / FILES[0]
    file.unlink()
    file.symlink_to(other / FILES[0])
    assert owned.discard(checkpoint_name(2)) == [f"{checkpoint_name(2)}/{FILES[0]}"] and (other / FILES[0]).exists()
    with pytest.raises(FileExistsError), root.child(checkpoint_name(2)).writing(FILES[0]):
        pass


@pytest.mark.parametrize("failing", ["read", "entries"])
def test_a_store_that_does_not_answer_loses_no_checkpoint(
    root: Folder, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The best one least of all, whose marker cannot be read just now."""
    owned = OwnedRoot(root, "mine")
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save(owned, step, validation_loss=loss)
    works = getattr(Folder, failing)

    def hiccup(self: Folder, *args: Any) -> Any:
        if self.path.endswith(checkpoint_name(1)):
            raise TimeoutError
        return works(self, *args)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Folder, failing, hiccup)
        prune(OwnedRoot(root, "mine"), keeping(keep=1, keep_best=True), 3)
    assert steps_saved(root) == [1, 2, 3]
    assert prune(owned, keeping(keep=1, keep_best=True), 3) == [] and steps_saved(root) == [1, 3]


def test_a_second_run_at_one_address_is_refused_until_it_is_asked_for(
    root: Folder, tmp_path: Path, opened: list[Any]
) -> None:
    first = claimed(root, tmp_path / "first", opened)
    save(first, 5)
    close(opened)
    assert claimed(root, tmp_path / "first", opened).run_id == first.run_id, "the run goes on"
    close(opened)
    for run_dir in (tmp_path / "second", tmp_path / "third"):
        if run_dir.name == "third":
            claimed(Folder(str(run_dir / "checkpoints")), run_dir, opened)
            close(opened)
        before = everything(root)
        with pytest.raises(
            CheckpointError, match=f"holds checkpoints of run {first.run_id} .*choose another"
        ) as refused:
            claimed(root, run_dir, opened)
        assert everything(root) == before and str(tmp_path / "first") in str(refused.value)
        close(opened)
    remedy = str(refused.value).partition("put ")[2].partition(" into ")
    Path(remedy[2]).write_text(remedy[0])
    assert claimed(root, tmp_path / "third", opened).run_id == first.run_id
    close(opened)
    with pytest.raises(CheckpointError, match=f"is where the run in {tmp_path}/third saves, and .*first is a copy"):
        claimed(root, tmp_path / "first", opened)


def test_the_newest_checkpoint_says_whose_a_root_is_if_run_json_is_gone(
    root: Folder, tmp_path: Path, opened: list[Any]
) -> None:
    first = claimed(root, tmp_path / "first", opened)
    save(first, 5)
    close(opened)
    root.remove_file("run.json")
    with pytest.raises(CheckpointError, match=f"holds checkpoints of run {first.run_id}"):
        claimed(root, tmp_path / "second", opened)
    close(opened)
    assert claimed(root, tmp_path / "first", opened).run_id == first.run_id


def test_a_root_is_locked_on_a_disk_and_watched_in_a_store(root: Folder, tmp_path: Path, opened: list[Any]) -> None:
    first = claimed(root, tmp_path / "first", opened)
    with pytest.raises(CheckpointError, match=f"run {first.run_id}.*(is saving there; wait|choose another)"):
        claimed(root, tmp_path / "second", opened)
    root.remove_file("run.json")
    put(root, "run.json", b'{"run_id": "second"}')
    with pytest.raises((LockLostError, CheckpointError), match=r"was removed or replaced|was taken by run second"):
        save(first, 1)


def test_of_runs_that_start_at_one_moment_one_wins(tmp_path: Path, opened: list[Any]) -> None:
    root, together = Folder(str(tmp_path / "root")), threading.Barrier(6)
    directories = [directory(tmp_path / f"run{number}", opened) for number in range(6)]
    won: list[OwnedRoot] = []

    def start(each: RunDirectory) -> None:
        together.wait()
        with contextlib.suppress(CheckpointError):
            won.append(claim(root, each))

    threads = [threading.Thread(target=start, args=(each,)) for each in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.extend(won)
    assert len(won) == 1 and json.loads((tmp_path / "root/run.json").read_text())["run_id"] == won[0].run_id


def test_a_run_that_is_moved_goes_on_and_its_copy_is_not_mixed_up_with_it(
    root: Folder, tmp_path: Path, opened: list[Any]
) -> None:
    first = claimed(root, tmp_path / "first", opened)
    close(opened)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    with pytest.raises(CheckpointError, match=f"is where the run in {tmp_path}/first saves, and run_dir .*copy is a"):
        claimed(root, tmp_path / "copy", opened)
    close(opened)
    assert claimed(Folder(str(tmp_path / "copy/checkpoints")), tmp_path / "copy", opened).run_id == first.run_id
    close(opened)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert claimed(root, tmp_path / "moved", opened).run_id == first.run_id


def test_a_run_that_lost_its_records_goes_on_as_the_run_of_its_checkpoints(tmp_path: Path, opened: list[Any]) -> None:
    root, run_dir = Folder(str(tmp_path / "run/checkpoints")), tmp_path / "run"
    first = claimed(root, run_dir, opened)
    assert first.words == []
    save(first, 5)
    close(opened)
    for file in (run_dir / "run.json", run_dir / "checkpoints/run.json"):
        file.unlink()
        found = claimed(root, run_dir, opened)
        assert found.run_id == first.run_id == recorded_run_id(run_dir), file
        assert (len(found.words) == 1 and first.run_id in found.words[0]) == (file.parent == run_dir)
        close(opened)


def test_checkpoints_of_an_earlier_version_are_those_of_whoever_has_the_folder(
    root: Folder, tmp_path: Path, opened: list[Any]
) -> None:
    fill(root.child(checkpoint_name(4)), 4)
    first = claimed(root, tmp_path / "first", opened)
    assert first.is_ours(checkpoint_name(4))
    check_owner(root.child(checkpoint_name(4)), read_marker(root.child(checkpoint_name(4))), first.run_id)
    close(opened)
    with pytest.raises(CheckpointError, match="holds checkpoints of run"):
        claimed(root, tmp_path / "second", opened)


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"{}", b'{"run_id": ["x"]}', b'{"run_id": "../x"}', b"[" * 9999])
def test_a_run_json_of_somebody_else_is_not_overwritten(
    root: Folder, tmp_path: Path, opened: list[Any], content: bytes
) -> None:
    put(root, "run.json", content)
    with pytest.raises(CheckpointError, match=r"run\.json: names no run; restore it, or move it away"):
        claimed(root, tmp_path / "first", opened)
    assert root.read("run.json") == content


def test_a_checkpoint_of_another_run_is_not_resumed() -> None:
    with pytest.raises(CheckpointError, match="a/step_00000001: is of run b, and this is run a; move it away"):
        check_owner(Folder("memory://a/step_00000001"), {"run_id": "b"}, "a")
    check_owner(Folder("memory://a/step_00000001"), {"run_id": "b"}, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 7}, "is of step 7, not of step 6"),
        ({"step": True}, "checkpoint.step is true"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "'../x' is no name of a file of a checkpoint"),
        ({"files": {"tensors.json": {"bytes": "1"}}}, 'tensors.json.bytes is "1", expected a whole number'),
        ({"data_state": []}, "data_state is a list, expected an object"),
        ({"format": 4}, "of format 4, not 3"),
    ],
)
def test_a_marker_is_of_its_folder_and_of_the_right_types(root: Folder, change: dict[str, Any], words: str) -> None:
    folder = root.child(checkpoint_name(6))
    fill(folder, **{"step": 6, **change})
    with pytest.raises(DamagedFileError, match="step_00000006/checkpoint.json: .*" + words):
        read_marker(folder)


def test_a_pipe_in_place_of_a_marker_is_damage(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "checkpoint.json")
    with pytest.raises(DamagedFileError, match="no regular file"):
        read_marker(Folder(str(tmp_path)))
