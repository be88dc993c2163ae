"""The folder of a run: it holds one run of one model and seed, and one job at a time trains there.

What lies in it is listed in train/run/names.py. It is read through train/run/reader.py.
"""

import os
import platform
import stat
from pathlib import Path
from typing import Any

from data.errors import printable
from data.files.own import open_to_read, write_atomically
from data.files.strict_json import to_json
from train.config import Config
from train.run import names
from train.run.identity import MOST_BYTES, Identity, identity_or_none, parse_identity
from train.run.lock import FileLock, HeldError
from train.run.provenance import description
from train.run.reader import RunError, RunReader
from train.run.same_run import Use, same_run_in


class RunDirectory:
    """An open run folder; only one process of a job opens it for writing.

    Opening changes nothing in the folder but the lock. `identify` and `describe` are called once less and less can
    refuse to start.

    Attributes:
        path: of the folder.
        identity: of the run as it is recorded; None if the run is new, or of an earlier version.

    Raises:
        RunError: another live process trains there, it holds a run of another model or seed, or files that are no
            run's, or it cannot be written.
    """

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path, self._config = Path(path), config
        try:
            check_links(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            check_is_of_a_run(self.path)
            self._lock = FileLock(self.path / names.LOCK)
        except HeldError as held:
            holder = printable((held.strerror or "").strip()[:200]) or "another process"
            raise RunError(
                f"run_dir {self.path}: {holder} is training there; wait for it or choose another run_dir"
            ) from None
        except OSError as error:
            raise RunError(f"run_dir {self.path}: cannot be written ({error}); choose another run_dir") from None
        try:
            self._lock.write(f"process {os.getpid()} on {platform.node()}")
            check_same_run(self.path, config)
            self.identity = recorded_identity(self.path)
        except BaseException:
            self._lock.close()
            raise

    def identify(self, identity: Identity) -> None:
        """Give the run its identity; write run.json unless that has it."""
        self.identity = identity
        if identity_in(file := self.path / names.IDENTITY) != identity:
            write_atomically(file, identity.to_json())

    def describe(self, dataset: dict[str, Any], origin: dict[str, Any] | None = None) -> None:
        """Write config.json.

        Args:
            dataset: its identity (train.checkpoint.load.dataset_identity).
            origin: where the run's first weights come from, if not from the seed.
        """
        run_id = None if self.identity is None else self.identity.run_id
        about = {"vocab_size": dataset["vocab_size"], "dataset": dataset, "run_id": run_id, **(origin or {})}
        write_atomically(self.path / names.CONFIG, to_json({**about, **description(self._config)}, indent=2) + "\n")

    def check(self) -> None:
        """Raise LockLostError if another process may have taken the folder."""
        self._lock.check()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def check_links(run_dir: Path) -> None:
    """Check who made the links that a run would write through: the run's folder itself, and its folders in it.

    A link to another disk is fine if this user made it, or the owner of the folder that holds it. Anybody else's may
    lead anywhere.

    Raises:
        RunError: names the link, its owner and where it leads.
    """
    for path in (run_dir, *(run_dir / name for name in (names.CHECKPOINTS, names.TENSORBOARD, names.STACKS))):
        check_link(path)


def check_link(path: Path) -> None:
    """Check one path as `check_links` does; it need not exist."""
    try:
        there = path.lstat()
        trusted = {os.geteuid(), path.absolute().parent.stat().st_uid}
    except OSError:
        return
    if stat.S_ISLNK(there.st_mode) and there.st_uid not in trusted:
        raise RunError(
            f"{path}: is a link to {os.readlink(path)} that user {there.st_uid} made, who owns neither this process "
            "nor the folder; remove it, or make it yourself"
        )


def check_is_of_a_run(path: Path) -> None:
    """Check that a folder is empty, holds a run, or holds only what is put there before a run begins.

    Raises:
        RunError: it holds other files.
    """
    there = {entry.name for entry in path.iterdir()}
    others = sorted(name for name in there if not names.may_precede_a_run(name))
    if others and not there & {names.CONFIG, names.IDENTITY}:
        shown = ", ".join(printable(name) for name in others[:3]) + (", ..." if len(others) > 3 else "")
        raise RunError(
            f"run_dir {path}: holds {len(others)} files or folders that are no run's ({shown}), and no {names.CONFIG}; "
            "choose an empty folder"
        )


def check_same_run(path: Path, config: Config) -> None:
    """Check that the folder holds no run of another model or seed.

    Raises:
        RunError: it does; names the first keys that differ.
    """
    differing = same_run_in(path, config.as_dict(), Use.FOLDER)
    if differing:
        another = "model" if any(each.key.startswith("model.") for each in differing) else "seed"
        shown = "; ".join(f"{each.key} is {each.there!r} there and {each.here!r} here" for each in differing[:3])
        raise RunError(f"run_dir {path} holds a run of another {another} ({shown}); choose another run_dir")


def recorded_run_id(run_dir: Path) -> str | None:
    """Return the number of `recorded_identity`."""
    found = recorded_identity(run_dir)
    return None if found is None else found.run_id


def recorded_identity(run_dir: Path) -> Identity | None:
    """Return the identity that run.json or else config.json records; None if neither does.

    Raises:
        RunError: one of them is damaged.
    """
    described = RunReader(run_dir).description() or {}
    file = run_dir / names.IDENTITY
    found = identity_in(file) or identity_or_none(described.get("run_id"))
    if found is None and file.exists() and file.stat().st_size:
        raise RunError(f"{file}: names no run; restore it, or delete it if the run is this folder's")
    return found


def identity_in(file: Path) -> Identity | None:
    """Return the identity in a file; None if there is none, or it cannot be read."""
    try:
        with open_to_read(file) as opened:
            return parse_identity(opened.read(MOST_BYTES))
    except OSError:
        return None
