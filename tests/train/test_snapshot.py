"""A job runs the snapshot in a run's folder, so only one that the user took, or the checkout's own code, will do."""

import shutil
from pathlib import Path

import pytest

from train import snapshot
from train.run.reader import RunError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, and a small checkout."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkout = tmp_path / "checkout"
    (checkout / "train").mkdir(parents=True)
    (checkout / "train/main.py").write_text("print('ours')\n")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    return tmp_path


def test_the_users_own_snapshot_is_kept_when_the_checkout_changes(home: Path) -> None:
    snapshot.take(home / "run")
    (home / "checkout/train/main.py").write_text("print('newer')\n")
    shutil.copytree(home / "run", home / "moved")
    for run in ("run", "moved"):
        snapshot.take(home / run)
        assert (home / run / "code/train/main.py").read_text() == "print('ours')\n"


def test_the_checkouts_own_code_needs_no_record(home: Path) -> None:
    snapshot.take(home / "run")
    shutil.rmtree(home / "cache")
    snapshot.take(home / "run")


@pytest.mark.parametrize("what", ["changed", "added", "beside", "link", "all"])
def test_code_that_a_stranger_put_there_is_refused(home: Path, what: str) -> None:
    snapshot.take(home / "run")
    code = home / "run/code"
    if what == "changed":
        (code / "train/main.py").write_text("print('theirs')\n")
    elif what == "added":
        (code / "train/torch.py").write_text("")
    elif what == "beside":
        (code / "torch.py").write_text("")
    elif what == "link":
        (code / "train/torch.py").symlink_to("/dev/null")
    else:
        shutil.rmtree(home / "cache")
        (home / "checkout/train/main.py").write_text("print('newer')\n")
    with pytest.raises(RunError, match="delete it to take a new one"):
        snapshot.take(home / "run")


def test_bytecode_does_not_run_in_the_place_of_its_source(home: Path) -> None:
    snapshot.take(home / "run")
    planted = home / "run/code/train/__pycache__/main.cpython-311.pyc"
    planted.parent.mkdir()
    planted.write_bytes(b"")
    snapshot.take(home / "run")
    assert not planted.exists()
