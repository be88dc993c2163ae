"""The folder of a run: who holds it, whose files lie in it, and links that somebody planted there."""

import os
import signal
from pathlib import Path

import pytest

from train.config import Config
from train.run.directory import RunDirectory, check_links, recorded_identity
from train.run.identity import Identity, new_run_id, parse_identity
from train.run.lock import FileLock, HeldError, LockLostError
from train.run.names import checkpoint_name, step_of
from train.run.reader import RunError

DATASET = {"vocab_size": 400, "tokenizer_sha256": "ab", "fingerprint": "cd"}


def opened(path: Path) -> RunDirectory:
    return RunDirectory(path, Config(run_dir=str(path)))


@pytest.mark.parametrize("name", ["step_1", "step_00000008.bak", "step_0000000\uff18", "step_-0000001", "step_", "x",
                                  "step_000000008", "step_" + "9" * 5000, "step_00000008\n"])  # fmt: skip
def test_only_the_exact_name_is_a_checkpoints(name: str) -> None:
    assert step_of(name) is None


@pytest.mark.parametrize("step", [0, 8, 12_345_678, 123_456_789])
def test_a_checkpoints_name_gives_its_step_back(step: int) -> None:
    assert step_of(checkpoint_name(step)) == step


def test_a_folder_with_others_files_is_refused_and_nothing_is_put_there(tmp_path: Path) -> None:
    for name in ("thesis.tex", "photo.jpg", "data", "a\x1b[31m"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        with pytest.raises(RunError, match=r"holds 4 files or folders .*data, photo.*\), and no config"):
            opened(tmp_path)
        assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "config.json").write_text('{"config": {}}')
    with pytest.raises(RunError, match="holds a run of another model"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "entropy.jsonl", "ranks.jsonl", "goodput.json"])
def test_curves_without_a_run_are_someone_elses(tmp_path: Path, name: str) -> None:
    """Other programs, too, write a metrics.jsonl; a run that begins would cut its rows off."""
    rows = '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.4}\n'
    (tmp_path / name).write_text(rows)
    with pytest.raises(RunError, match=name):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == rows


def test_what_is_put_there_before_a_run_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("code", "resolved.json", "starts.txt", "stage.json", "log.txt", "failure.txt", "slurm-17.out",
                 "train.log", "checkpoints", "figures", "run.lock", "lost+found", "code.1a2b3c4d.tmp",
                 ".run.json.1a2b3c4d.tmp"):  # fmt: skip
        (tmp_path / name).touch()
    opened(tmp_path).close()
    opened(tmp_path / "new" / "run").close()


@pytest.mark.parametrize("name", ["run.lock", "run.json", "config.json"])
def test_a_planted_link_is_not_written_through(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_text('{"config": null}' if name == "config.json" else "precious")
    before = target.read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(target)
    try:
        directory = opened(run)
        directory.identify(Identity(new_run_id()))
        directory.describe(DATASET)
        directory.close()
    except RunError as error:
        assert str(run / name) in str(error) or str(run) in str(error)
    assert target.read_bytes() == before


@pytest.mark.parametrize("name", ["run.lock", "run.json"])
def test_a_pipe_does_not_keep_a_start_waiting(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    signal.alarm(20)
    try:
        directory = opened(tmp_path)
        directory.identify(Identity("a"))
        directory.close()
    except RunError as error:
        assert "no regular file" in str(error)
    finally:
        signal.alarm(0)


def test_links_are_followed_if_their_maker_owns_them_or_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    opened(tmp_path / "run").close()
    other, lstat = os.geteuid() + 1, Path.lstat

    def by_another(self: Path) -> os.stat_result:
        found = list(lstat(self))
        found[4] = other if self.name == "checkpoints" else found[4]
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", by_another)
    with pytest.raises(RunError, match=f"checkpoints: is a link to .*disk that user {other} made"):
        check_links(tmp_path / "run")


def test_a_lock_is_taken_once_and_its_loss_is_noticed(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    lock.write("process 7 on node3")
    with pytest.raises(HeldError) as held:
        FileLock(tmp_path / "lock")
    assert held.value.strerror == "process 7 on node3"
    lock.check()
    for replace in (False, True):
        (tmp_path / "lock").unlink(missing_ok=True)
        if replace:
            FileLock(tmp_path / "lock").close()
        with pytest.raises(LockLostError, match="lock: was removed or replaced while this process held it"):
            lock.check()
    lock.close()


def test_a_run_keeps_its_identity(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    assert directory.identity is None
    directory.identify(Identity("f00d", str(tmp_path)))
    directory.describe(DATASET)
    directory.close()
    for lost in ("run.json", None):
        assert (found := recorded_identity(tmp_path)) is not None and found.run_id == "f00d"
        (tmp_path / (lost or "config.json")).unlink()
    assert recorded_identity(tmp_path) is None
    (tmp_path / "run.json").write_text("notes")
    with pytest.raises(RunError, match=r"run\.json: names no run; restore it, or delete it"):
        opened(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 3}', '{"run_id": ""}', '{"run_id": "a\\nb"}', "\xff"])
def test_what_is_no_identity_is_none(content: str) -> None:
    assert parse_identity(content) is None
    assert parse_identity(Identity("a", "b").to_json()) == Identity("a", "b")
