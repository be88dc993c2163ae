"""Say which code and which versions made something: the commit, the packages, the resolved configuration."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from data.files.own import open_to_read
from train.config import Config

COMMIT = "COMMIT"
"""File at the root of a snapshot of the code (train.snapshot) that says which commit it is."""
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "sentencepiece", "triton")
OURS = ("pyproject.toml", "train/run/provenance.py")
"""Files that a repository tracks at its top if it is this project's."""
CODE = ("model", "parallel", "data", "train")
_COMMIT_WORD = re.compile(r"[0-9a-f]{40,64}(-dirty)?")
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_TIME_LIMIT_S = 10


def description(config: Config) -> dict[str, Any]:
    """Return the part of config.json that follows from the configuration and this installation."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"config": config.record(), "versions": versions, "git_commit": git_commit()}


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the code that runs, or None if it is in no repository of this project.

    It ends in '-dirty' if a tracked file differs from the commit, or if there is a Python file that it does not track.
    """
    return commit_of(ROOT)


def commit_of(root: Path) -> str | None:
    """Return the commit of a copy of the project, as `git_commit` does for the copy that runs.

    An installation inside another project's repository has none, even if that repository tracks it.
    """
    try:
        with open_to_read(root / COMMIT) as file:
            noted = file.read(100).decode("ascii", "replace").strip()
        return noted if _COMMIT_WORD.fullmatch(noted) else None
    except OSError:
        pass
    if _git(root, "ls-files", "--error-unmatch", "--", *OURS) is None:
        return None
    status = _git(root, "status", "--porcelain=v2", "--branch", "--ignore-submodules=all", "--no-renames")
    commit = re.search(r"^# branch\.oid ([0-9a-f]{40,64})$", status or "", re.MULTILINE)
    if status is None or commit is None:
        return None
    changes = [line for line in status.splitlines() if not line.startswith("#")]
    is_dirty = any(not line.startswith("?") or _is_code(root, line[2:]) for line in changes)
    return commit[1] + ("-dirty" if is_dirty else "")


def _is_code(root: Path, untracked: str) -> bool:
    """Whether an untracked file or folder is code of the project, and not a dataset or a note that lies in it."""
    of_package = untracked.partition("/")[0] in CODE
    return of_package and (untracked.endswith(".py") or (root / untracked / "__init__.py").exists())


def _git(root: Path, *words: str) -> str | None:
    """Run git on the repository whose top is `root`, never on one above it; return its output, or None if it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment.update(GIT_CEILING_DIRECTORIES=str(root.parent), LC_ALL="C")
    try:
        return subprocess.run(
            [*_GIT, *words],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=_TIME_LIMIT_S,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
