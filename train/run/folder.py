"""What a run records of itself, and its files of one JSON object a line. train/run/directory.py opens its folder."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from data.files.own import write_atomically
from data.files.strict_json import finite_or_none
from train.config import Config
from train.run.reader import read_rows

COMMIT = "COMMIT"
"""File at the root of a snapshot of the code (train.snapshot) that says which commit it is."""
PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "sentencepiece", "triton")


def description(config: Config) -> dict[str, Any]:
    """Return the part of config.json that follows from the configuration and this installation."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"config": config.record(), "versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    """Return the commit of the code that runs, or None outside a git checkout.

    It ends in '-dirty' if files differ from the commit.
    """
    noted = Path(__file__).resolve().parents[2] / COMMIT
    if noted.exists():
        return noted.read_text().strip()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class JsonLines:
    """A file of one JSON object a line, each of some step.

    Args:
        path: of the file; rows of later steps than `last_step` are removed, so that no step appears twice.
        last_step: the step that the run resumes after.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        if path.exists():
            rows = [row for row in read_rows(path) if row["step"] <= last_step]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, with null for what is not finite; it is in the file when this returns."""
        self._file.write(json.dumps({key: finite_or_none(value) for key, value in row.items()}) + "\n")

    def close(self) -> None:
        self._file.close()
