"""The folder or store of a run's checkpoints: one run owns it, and touches nothing there that it has not written.

    checkpoints/run.json                  whose it is; on a disk also the lock of the process that trains
    checkpoints/step_00000500/run.json    whose checkpoint it is; written first, deleted last

People keep other files there too, and runs are pointed at one place by mistake. So a folder counts as this run's only
under the exact name of a checkpoint, and if its run.json, or a sound marker of an earlier version, says so. In it only
files by names that checkpoints have are deleted. The rest is left, and reported.

A store has no locks: run.json keeps other runs out, and the lock on run_dir another process of the same run.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.checkpoint.folder import DamagedFileError, Folder, is_file_of_ours, parse_marker
from train.run.directory import RunDirectory, check_link, identity_in
from train.run.identity import MOST_BYTES, Identity, identity_or_none, new_run_id, parse_identity
from train.run.lock import FileLock, HeldError
from train.run.names import IDENTITY, MARKER, checkpoint_name, step_of
from train.run.reader import RunError

THREADS = 8


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message is one line."""


class OwnedRoot:
    """Checkpoints of one run below a folder.

    Args:
        root: of the checkpoints.
        run_id: the run's identity.
        lock: on the root, if it is on a disk and this process saves there.
        words: what a person should know of how the root was found.
    """

    def __init__(self, root: Folder, run_id: str, lock: FileLock | None = None, words: Iterable[str] = ()) -> None:
        self.root, self.run_id, self.words = root, run_id, list(words)
        self._lock = lock
        self._known_as_ours: set[str] = set()

    def is_ours(self, name: str) -> bool:
        """Return whether a checkpoint's folder, complete or not, is of this run.

        Raises:
            OSError: it cannot be read now.
        """
        if name not in self._known_as_ours:
            folder = self.root.child(name)
            if not self._is_ours(folder, folder.entries()):
                return False
            self._known_as_ours.add(name)
        return True

    def begin(self, name: str) -> None:
        """Make a checkpoint's folder ready to be written; what is left of an earlier one of this run is deleted.

        Raises:
            CheckpointError: something is there that this run has not written, or another run took the root.
            LockLostError: the lock's file was removed or replaced.
            OSError: the folder cannot be written.
        """
        self.check()
        if self._lock is None and (there := recorded_owner(self.root)) is not None and there.run_id != self.run_id:
            raise CheckpointError(f"{self.root.address}: was taken by {_name(there)} while this run trained")
        folder = self.root.child(name)
        found = folder.entries()
        if found and not self._is_ours(folder, found):
            raise CheckpointError(f"{folder.address}: {NOT_OURS}")
        if found:
            self._delete(folder, found)
        else:
            folder.make()
            folder.create(IDENTITY, self._identity())
        self._known_as_ours.add(name)

    def discard(self, name: str) -> list[str]:
        """Delete a checkpoint's folder, its marker first, so that no half-deleted checkpoint looks complete.

        Returns:
            What was left: the folder if it is not of this run, or the files in it that no checkpoint has.
        """
        folder = self.root.child(name)
        found = folder.entries()
        if found and not self._is_ours(folder, found):
            return [name]
        left = self._delete(folder, found) if found else []
        if found and not left:
            folder.remove_file(IDENTITY)
        if not left:
            folder.remove_if_empty()
        self._known_as_ours.discard(name)
        return [f"{name}/{each}" for each in left]

    def discard_all(self) -> list[str]:
        """Delete all checkpoints of this run; return what was left, as `discard` does."""
        return [left for name in self.root.names() if step_of(name) is not None for left in self.discard(name)]

    def in_the_way(self, after: int, is_due: Callable[[int], bool]) -> list[str]:
        """Return the folders of steps after `after` that are not this run's.

        Raises:
            CheckpointError: a checkpoint is due at such a step.
            OSError: the root cannot be read now.
        """
        steps = [step for name in self.root.names() if (step := step_of(name)) is not None and step > after]
        others = [step for step in steps if self.root.child(checkpoint_name(step)).entries()]
        others = [step for step in others if not self.is_ours(checkpoint_name(step))]
        for step in filter(is_due, others):
            raise CheckpointError(f"{self.root.child(checkpoint_name(step)).address}: {NOT_OURS}")
        return [checkpoint_name(step) for step in others]

    def check(self) -> None:
        """Raise LockLostError if another process may have taken the root; in a store, look only at each save."""
        if self._lock is not None:
            self._lock.check()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def _identity(self) -> bytes:
        return Identity(self.run_id).to_json().encode()

    def _is_ours(self, folder: Folder, found: dict[str, bool]) -> bool:
        """Whether run.json says so, or a sound marker where that is missing: earlier versions wrote none."""
        if (path := folder.local_path) is not None and path.is_symlink():
            return False
        if found.get(IDENTITY):
            if (marked := _identity_of(folder)) is not None:
                return marked.run_id == self.run_id
            if len(found) == 1 and not folder.read(IDENTITY):  # an empty file: a crash came before its content
                return True
        if found.get(MARKER):
            try:
                return parse_marker(folder, folder.read(MARKER)).get("run_id") in (None, self.run_id)
            except (DamagedFileError, ValueError):
                pass
        return False

    def _delete(self, folder: Folder, found: dict[str, bool]) -> list[str]:
        """Delete the files of a checkpoint but for run.json; return the names of what else is there."""
        if not found.get(IDENTITY) or _identity_of(folder) is None:  # an earlier version's, or damaged
            if IDENTITY in found:
                folder.remove_file(IDENTITY)
            folder.create(IDENTITY, self._identity())  # so that an interrupted deletion is gone on with
        ours = {name for name, is_file in found.items() if is_file and is_file_of_ours(name)}
        if MARKER in ours:
            folder.remove_file(MARKER)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="delete") as threads:
            list(threads.map(folder.remove_file, ours - {MARKER}))
        return sorted(found.keys() - ours - {IDENTITY})


NOT_OURS = "is there already, and this run has not written it; move it away, or choose another checkpoint.path"


def claim(root: Folder, directory: RunDirectory) -> OwnedRoot:
    """Take the root of checkpoints for a run, and give a new run its identity.

    Raises:
        CheckpointError: another run owns it, another process writes there, or it cannot be written.
    """
    lock = None
    try:
        if root.local_path is not None:
            check_link(root.local_path)
        probe(root)
        if root.local_path is not None:
            lock = FileLock(root.local_path / IDENTITY, required=False)
        run_id, words = _decide(root, directory, owner_of(root))
        mine = Identity(run_id, str(directory.path.absolute()))
        directory.identify(mine)
        _record(root, lock, mine)
        return OwnedRoot(root, run_id, lock, words)
    except Exception as error:  # stores raise errors of their own
        if lock is not None:
            lock.close()
        if isinstance(error, CheckpointError | RunError):
            raise
        if isinstance(error, HeldError):
            holder = _name(parse_identity(error.strerror or ""))
            raise CheckpointError(
                f"{root.address}: {holder} is saving there; wait for it, or choose another checkpoint.path"
            ) from None
        raise CheckpointError(
            f"{root.address}: cannot be written ({error}); choose another checkpoint.path or run_dir"
        ) from None


def probe(root: Folder) -> None:
    """Make the folder, and see that a new file can be written and deleted there."""
    root.make()
    name = f".probe.{secrets.token_hex(8)}.tmp"
    root.create(name, b"")
    root.remove_file(name)


def recorded_owner(root: Folder) -> Identity | None:
    """Return the identity in a root's run.json; None if there is none, or an empty one, which a crash leaves.

    Raises:
        CheckpointError: the file holds something else.
    """
    if IDENTITY not in root.names():
        return None
    content = root.read(IDENTITY)
    if (owner := parse_identity(content)) is None and content:
        raise CheckpointError(f"{root.describe(IDENTITY)}: names no run; restore it, or move it away if it is no run's")
    return owner


def owner_of(root: Folder) -> Identity | None:
    """Return whose checkpoints lie below a root: run.json says so, or else the newest sound checkpoint.

    Checkpoints of earlier versions do not say it: they are of whoever comes first.

    Raises:
        CheckpointError: run.json is damaged.
    """
    if (recorded := recorded_owner(root)) is not None:
        return recorded
    for step in sorted((step for name in root.names() if (step := step_of(name)) is not None), reverse=True):
        folder = root.child(checkpoint_name(step))
        if MARKER in folder.entries():
            try:
                marker = parse_marker(folder, folder.read(MARKER))
            except (DamagedFileError, ValueError):
                continue
            return identity_or_none(marker.get("run_id"), str(marker["config"].get("run_dir", "")))
    return None


def _decide(root: Folder, directory: RunDirectory, owner: Identity | None) -> tuple[str, list[str]]:
    """Return the run's identity, and what to say of it; raise CheckpointError if the root is another run's."""
    ours = directory.identity
    if owner is None:
        return new_run_id() if ours is None else ours.run_id, []
    if ours is None and _is_inside(root, directory.path):
        return owner.run_id, [
            f"run_dir {directory.path} had no {IDENTITY}; going on as the run of its checkpoints, {owner.run_id}"
        ]
    if ours is None or ours.run_id != owner.run_id:
        raise CheckpointError(
            f"{root.address}: holds checkpoints of {_name(owner)}, and run_dir {directory.path} is "
            f"{'a new one' if ours is None else f'run {ours.run_id}'}; choose another checkpoint.path. To go on with "
            f'that run here, put {{"run_id": "{owner.run_id}"}} into {directory.path / IDENTITY}'
        )
    if ours.run_dir and not _is_inside(root, directory.path) and _is_also_in(owner, directory.path):
        raise CheckpointError(
            f"{root.address}: is where the run in {owner.run_dir} saves, and run_dir {directory.path} is a copy of its "
            "folder; choose another checkpoint.path for the copy, and copy the checkpoints there"
        )
    return owner.run_id, []


def _is_also_in(owner: Identity, run_dir: Path) -> bool:
    """Whether the run has another folder that is still there; one that was moved is not, under its old name."""
    other = Path(owner.run_dir or run_dir)
    if not other.exists() or other.samefile(run_dir):
        return False
    there = identity_in(other / IDENTITY)
    return there is not None and there.run_id == owner.run_id


def _record(root: Folder, lock: FileLock | None, mine: Identity) -> None:
    """Write run.json unless it has this identity and folder; raise CheckpointError if another run was faster."""
    if lock is not None:
        if parse_identity(lock.read()) != mine:
            lock.write(mine.to_json())
        return
    there = recorded_owner(root)
    if there is not None and there.run_id == mine.run_id and there != mine:
        root.remove_file(IDENTITY)  # the run's folder was moved
        there = None
    if there is None:
        with contextlib.suppress(FileExistsError):
            root.create(IDENTITY, mine.to_json().encode())
    there = recorded_owner(root)
    if there is not None and there.run_id != mine.run_id:
        raise CheckpointError(f"{root.address}: {_name(there)} began there just now; choose another checkpoint.path")


def _identity_of(folder: Folder) -> Identity | None:
    try:
        return parse_identity(folder.read(IDENTITY, MOST_BYTES))
    except ValueError:
        return None


def _is_inside(root: Folder, run_dir: Path) -> bool:
    """Whether the root lies in the run's folder under its name, which may be a link to another disk."""
    path = root.local_path
    return path is not None and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(run_dir))


def _name(owner: Identity | None) -> str:
    if owner is None:
        return "another process"
    return f"run {owner.run_id}" + (f" ({owner.run_dir})" if owner.run_dir else "")
