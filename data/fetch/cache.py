"""Keep fetched files on a local disk, for all processes of a machine and within a size limit.

    cache/ab/abcdef...          a complete file whose sha256 is abcdef...
    cache/ab/abcdef....partial  a file being fetched, at its full size so that its space is reserved
    cache/lock, ab/*.lock       locks; the system releases those of a process that was killed

A process takes a file's lock first, then cache/lock.

The least recently used files are removed to make room. An open file stays readable after it was removed. Files of
other names are not counted, removed or written to, since the folder may hold what is not the cache's.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.errors import DataError
from data.fetch.transport import WrongContentError
from data.files.own import open_to_append

_OWN_NAME = re.compile(r"[0-9a-f]{64}(\.partial)?")


class Cache:
    """Files by their sha256 in the folder `root`, at most `limit_bytes` in all."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root, self._limit_bytes = root, limit_bytes

    def find(self, sha256: str, num_bytes: int) -> Path | None:
        """Return the cached file and mark it as just used; None if it is missing or has another size."""
        path = self._path(sha256)
        try:
            if path.stat().st_size != num_bytes:
                return None
            os.utime(path)
        except OSError:
            return None
        return path

    def fill(self, sha256: str, num_bytes: int, pieces: Iterable[bytes], where: str) -> Path:
        """Store the content that `pieces` yield, unless another process has done so meanwhile.

        Args:
            sha256: Hash of the content, by which it is stored.
            num_bytes: Its size.
            pieces: The content, piece by piece.
            where: What error messages call the file.

        Raises:
            WrongContentError: The content has another hash or size.
            DataError: The file is larger than the cache, or the cache cannot be written.
        """
        if num_bytes > self._limit_bytes:
            raise DataError(
                f"{where}: has {num_bytes} bytes, but the cache {self._root} may hold {self._limit_bytes}; "
                "raise cache_gigabytes"
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
            partial.unlink(missing_ok=True)  # left by a killed process; it must not be counted twice
            self._reserve(partial, num_bytes)
            try:
                _store(partial, pieces, sha256, num_bytes)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def forget(self, sha256: str) -> bool:
        """Remove a file; return whether there was one."""
        try:
            self._path(sha256).unlink()
        except FileNotFoundError:
            return False
        return True

    def _path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256

    def _reserve(self, partial: Path, num_bytes: int) -> None:
        """Create the partial file at its full size. Remove the least recently used files to make room."""
        with _lock(self._root / "lock"):
            for path, _ in list(self._files()):
                if path.suffix == ".partial":
                    _remove_if_left_by_a_kill(path)
            entries = sorted((status.st_mtime_ns, status.st_size, path) for path, status in self._files())
            excess = sum(size for _, size, _ in entries) + num_bytes - self._limit_bytes
            for _, size, path in entries:
                if excess <= 0:
                    break
                if path.suffix != ".partial":
                    path.unlink(missing_ok=True)
                    excess -= size
            with open_to_append(partial) as file:
                file.truncate(num_bytes)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._root.glob("??/*"):
            if _OWN_NAME.fullmatch(path.name) and path.name.startswith(path.parent.name):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()


def _remove_if_left_by_a_kill(partial: Path) -> None:
    """Remove a partial file whose lock is free. The lock is held meanwhile, so nobody can start to fetch that file."""
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
        raise WrongContentError(f"{received} bytes received, expected {num_bytes}")
    if digest.hexdigest() != sha256:
        raise WrongContentError(f"received sha256 {digest.hexdigest()}, expected {sha256}")


@contextlib.contextmanager
def _lock(path: Path, how: int = 0) -> Iterator[None]:
    with open_to_append(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        yield
