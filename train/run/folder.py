"""The folder of a run and the rule that it holds one run of one model and seed, written by one job at a time.

config.json          resolved configuration, the dataset's identity, versions, git commit
metrics.jsonl        a row for every step and every evaluation
entropy.jsonl        a row for every logging step: entropies, thresholds, temperatures, alpha, beta
evaluation.json      written by train.evaluate
tensorboard/  checkpoints/  figures/
"""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import IO, Any

from train.config import Config

LOOK_S = 1.0
"""Longer than a look at whether a folder is in use holds its lock."""


class RunError(ValueError):
    """The run folder cannot be used; one clear line."""


COMMIT = "COMMIT"
PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "sentencepiece", "triton")


class RunDirectory:
    """An open run folder; only one process of a job opens it for writing.

    What it says of its run is left as it is until `describe` is called, once nothing refuses to start any more.

    Raises:
        RunError: another live process trains there, or it holds a run of another model or seed.
    """

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path, self._config = Path(path), config
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise RunError(f"run_dir {self.path}: cannot be written ({error}); choose another run_dir") from None
        check_same_run(self.path, config)

    def describe(self, dataset: dict[str, Any]) -> None:
        """Writes config.json; `dataset` is its identity (train.parts.dataset_identity)."""
        content = {"vocab_size": dataset["vocab_size"], "dataset": dataset, **description(self._config)}
        write_atomically(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        self._lock.close()

    def _locked(self) -> IO[str]:
        lock = (self.path / "run.lock").open("a+")
        ends_at = time.monotonic() + LOOK_S
        while not _taken(lock):
            if time.monotonic() < ends_at:
                time.sleep(LOOK_S / 20)
                continue
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise RunError(f"run_dir {self.path}: {holder} is training there; wait for it or choose another run_dir")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        return lock


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_same_run(path: Path, config: Config) -> None:
    """Raises RunError where the folder holds a run whose model or seed differs, naming the first keys that do."""
    there = read_config(path)
    if there is None:
        return
    here = config.as_dict()
    fixed = [("model", key) for key in here["model"]] + [("training", "seed")]
    differing = [
        f"{section}.{key} is {there.get(section, {}).get(key)!r} there and {here[section][key]!r} here"
        for section, key in fixed
        if there.get(section, {}).get(key) != here[section][key]
    ]
    if differing:
        another = "model" if any(each.startswith("model.") for each in differing) else "seed"
        raise RunError(
            f"run_dir {path} holds a run of another {another} ({'; '.join(differing[:3])}); choose another run_dir"
        )


def read_config(path: Path) -> dict[str, Any] | None:
    """The resolved configuration of the run in a folder, or None where there is no run."""
    file = Path(path) / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return dict(tree["config"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: damaged ({error}); restore it or choose another run_dir") from None


def read_fingerprint(path: Path) -> str | None:
    """Of the dataset that the run in a folder reads; None where nothing says.

    Earlier versions noted it in checkpoints only.
    """
    for file in (path / "config.json", *(path / "checkpoints").glob("step_*/checkpoint.json")):
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            return str(tree.get("checkpoint", tree)["dataset"]["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def description(config: Config) -> dict[str, Any]:
    """Of config.json what follows from the configuration and this installation."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"config": config.as_dict(), "versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of the code that runs, marked '-dirty' where files differ from it; None outside a git checkout."""
    noted = Path(__file__).resolve().parents[2] / COMMIT  # in a snapshot of the code (train.snapshot)
    if noted.exists():
        return noted.read_text().strip()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, each of some step, without what a crash cut off; none where there is no file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [row for row in map(_row, lines) if row is not None]


class JsonLines:
    """A file of one JSON object a line, cut back to the resumed step so that no step appears twice."""

    def __init__(self, path: Path, last_step: int) -> None:
        if path.exists():
            rows = [row for row in read_rows(path) if row["step"] <= last_step]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps({key: finite_or_none(value) for key, value in row.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


def finite_or_none(value: Any) -> Any:
    """NaN and infinities as None, since JSON has neither; lists item by item."""
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
        return {**row, "step": int(row["step"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
