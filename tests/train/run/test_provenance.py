"""The commit that is noted is that of the code that runs, or none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from train.run import provenance
from train.run.provenance import COMMIT, OURS, commit_of

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def copy_of_the_project(root: Path) -> Path:
    for file in OURS:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    return root


def committed(root: Path) -> str:
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x")
    return git(root, "rev-parse", "HEAD").strip()


def test_our_own_repository_has_a_commit_and_says_when_it_differs(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "ours")
    commit = committed(root)
    assert commit_of(root) == commit
    (root / "data" / "mine").mkdir(parents=True)
    (root / "data" / "mine" / "dataset.json").touch()
    (root / "notes.py").touch()
    assert commit_of(root) == commit, "what is not code does not count"
    (root / "train" / "run" / "new.py").touch()
    assert commit_of(root) == f"{commit}-dirty"
    (root / "train" / "run" / "new.py").unlink()
    (root / OURS[0]).write_text("changed")
    assert commit_of(root) == f"{commit}-dirty"


@pytest.mark.parametrize("tracked", [True, False])
def test_a_copy_inside_another_repository_has_none(tmp_path: Path, tracked: bool) -> None:
    root = copy_of_the_project(tmp_path / "theirs" / ".venv" / "site-packages")
    (tmp_path / "theirs" / "file").touch()
    if not tracked:
        (tmp_path / "theirs" / ".gitignore").write_text(".venv\n")
    committed(tmp_path / "theirs")
    assert commit_of(root) is None


def test_a_repository_at_the_same_place_that_tracks_something_else_has_none(tmp_path: Path) -> None:
    root = tmp_path / "site-packages"
    root.mkdir()
    (root / "other.py").touch()
    committed(root)
    assert commit_of(copy_of_the_project(root)) is None


def test_another_repository_named_in_the_environment_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, root = copy_of_the_project(tmp_path / "theirs"), copy_of_the_project(tmp_path / "ours")
    committed(theirs)
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(theirs))
    assert commit_of(root) is None


def test_a_snapshot_says_its_commit_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / COMMIT).write_text("0123456789" * 4 + "-dirty\n")
    assert commit_of(tmp_path) == "0123456789" * 4 + "-dirty"
    for content in ("None\n", "unknown\n", "x" * 1000, ""):
        (tmp_path / COMMIT).write_text(content)
        assert commit_of(tmp_path) is None


def test_it_runs_no_program_of_the_repository(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "ours")
    committed(root)
    hook = root / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    for program in (tmp_path / "monitor", hook):
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        program.chmod(0o755)
    git(root, "config", "core.fsmonitor", str(tmp_path / "monitor"))
    os.utime(root / OURS[0])
    assert commit_of(root) is not None and not (tmp_path / "ran").exists()


def test_without_git_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(copy_of_the_project(tmp_path))
    monkeypatch.setattr(provenance, "_GIT", ("/no/such/git",))
    assert commit_of(tmp_path) is None
