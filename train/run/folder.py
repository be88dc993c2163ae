"""Write the folder of a run: it holds one run of one model and seed, and one job at a time trains there.

What lies in it is listed in train/run/names.py. It is read through train/run/reader.py.
"""

import fcntl
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

from data.files.own import write_atomically
from data.files.strict_json import to_json
from train.config import Config
from train.run import names
from train.run.provenance import description
from train.run.reader import RunError
from train.run.same_run import Use, same_run_in

LOOK_S = 1.0
"""Longer than a reader who asks whether a folder is in use holds its lock."""


class LockLostError(RuntimeError):
    """The run no longer holds its folder; the message is one line."""


class RunDirectory:
    """An open run folder; only one process of a job opens it for writing.

    Opening changes nothing in the folder but the lock. `describe` is called once nothing refuses to start any more.

    Raises:
        RunError: another live process trains there, it holds a run of another model or seed, or it cannot be written.
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
        """Write config.json.

        Args:
            dataset: its identity (train.parts.dataset_identity).
        """
        content = {"vocab_size": dataset["vocab_size"], "dataset": dataset, **description(self._config)}
        write_atomically(self.path / names.CONFIG, to_json(content, indent=2) + "\n")

    def check_held(self) -> None:
        """Check that the lock is still in the folder, since another training may come in where it is not.

        Raises:
            LockLostError: somebody removed or replaced it, or the whole folder.
        """
        path = self.path / names.LOCK
        try:
            is_held = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(path, follow_symlinks=False))
        except FileNotFoundError:
            is_held = False
        except OSError:  # a file server that does not answer now
            return
        if not is_held:
            raise LockLostError(
                f"{path}: was removed or replaced while the run held it, so another run may write to the same folder; "
                "see that none does, then start again: it goes on from the newest checkpoint"
            )

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _locked(self) -> IO[str]:
        lock = (self.path / names.LOCK).open("a+")
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
    """Check that the folder holds no run of another model or seed.

    Raises:
        RunError: it does; names the first keys that differ.
    """
    differing = same_run_in(path, config.as_dict(), Use.FOLDER)
    if differing:
        another = "model" if any(each.key.startswith("model.") for each in differing) else "seed"
        shown = "; ".join(f"{each.key} is {each.there!r} there and {each.here!r} here" for each in differing[:3])
        raise RunError(f"run_dir {path} holds a run of another {another} ({shown}); choose another run_dir")
