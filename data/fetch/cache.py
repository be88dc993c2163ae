"""Fetched files on a local disk: stored under their sha256, complete or absent, bounded, shared by a machine's
processes.

    cache/ab/abcdef...          a file whose sha256 is abcdef...
    cache/ab/abcdef....partial  one being fetched, already at its full size so that its space is accounted for
    cache/lock, ab/*.lock       locks; the system releases those of a process that was killed

Locks are waited for in one order: a file's, then cache/lock.

The least recently used files make room. A file that some process has open stays readable after it was removed.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.errors import DataError
from data.fetch.transport import WrongContentError


class Cache:
    """Files by their sha256 in the folder `root`, at most `limit_bytes` of them."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root, self._limit_bytes = root, limit_bytes

    def find(self, sha256: str, num_bytes: int) -> Path | None:
        """The cached file, if it is there in its full size, marked as just used."""
        path = self._path(sha256)
        try:
            if path.stat().st_size != num_bytes:
                return None
            os.utime(path)
        except OSError:
            return None
        return path

    def fill(self, sha256: str, num_bytes: int, pieces: Iterable[bytes], where: str) -> Path:
        """Store what `pieces` yield, unless another process has done so meanwhile.

        Raises WrongContentError if it is not what the sha256 says, DataError if it is larger than the cache or cannot
        be written.
        """
        if num_bytes > self._limit_bytes:
            raise DataError(
                f"{where}: has {num_bytes} bytes, the cache {self._root} may hold {self._limit_bytes}; raise its limit"
            )
        try:
            return self._fill(sha256, num_bytes, pieces)
        except OSError as error:
            raise DataError(
                f"cache {self._root}: cannot be written ({error.strerror}); free space there or choose another folder"
            ) from error

    def _fill(self, sha256: str, num_bytes: int, pieces: Iterable[bytes]) -> Path:
        path = self._path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            found = self.find(sha256, num_bytes)
            if found is not None:
                return found
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)  # of a process that was killed: not to be counted besides this one
            self._reserve(partial, num_bytes)
            try:
                _store(partial, pieces, sha256, num_bytes)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def forget(self, sha256: str) -> bool:
        """Remove a file; whether there was one."""
        try:
            self._path(sha256).unlink()
        except FileNotFoundError:
            return False
        return True

    def _path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256

    def _reserve(self, partial: Path, num_bytes: int) -> None:
        """Create the partial file at its full size, removing the files used longest ago to make room for it."""
        with _lock(self._root / "lock"):
            for other in self._root.glob("??/*.partial"):
                _remove_if_left_by_a_kill(other)
            entries = sorted((status.st_mtime_ns, status.st_size, path) for path, status in self._files())
            excess = sum(size for _, size, _ in entries) + num_bytes - self._limit_bytes
            for _, size, path in entries:
                if excess <= 0:
                    break
                if path.suffix != ".partial":
                    path.unlink(missing_ok=True)
                    excess -= size
            with partial.open("wb") as file:
                file.truncate(num_bytes)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._root.glob("??/*"):
            if path.suffix != ".lock":
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()


def _remove_if_left_by_a_kill(partial: Path) -> None:
    """Remove a partial file whose lock nobody holds; who wants to fetch the same file waits for the lock meanwhile."""
    with contextlib.suppress(BlockingIOError), _lock(partial.with_suffix(".lock"), fcntl.LOCK_NB):
        partial.unlink(missing_ok=True)


def _store(partial: Path, pieces: Iterable[bytes], sha256: str, num_bytes: int) -> None:
    digest, received = hashlib.sha256(), 0
    with partial.open("r+b") as file:
        for piece in pieces:
            received += len(piece)
            if received > num_bytes:
                break
            file.write(piece)
            digest.update(piece)
    if received != num_bytes:
        raise WrongContentError(f"{received} bytes came, expected {num_bytes}")
    if digest.hexdigest() != sha256:
        raise WrongContentError(f"sha256 {digest.hexdigest()} came, expected {sha256}")


@contextlib.contextmanager
def _lock(path: Path, how: int = 0) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        yield
