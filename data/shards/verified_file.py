"""Map a file into memory and check every byte before it is used."""

import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.errors import DamagedShardFileError
from data.fetch.transport import FetchError, with_retries
from data.shards.tar_layout import CHUNK_BYTES, DIGEST_BYTES, chunk_digest

_ATTEMPTS = 5
T = TypeVar("T")


class VerifiedFile:
    """A mapped file. Memory is one digest (16 bytes) and one flag for each 16 KiB of it.

    A chunk is checked when it is first read, and again if the file has been written to since.

    Args:
        path: The local file.
        where: What error messages call the file.
        num_bytes: Its size.
        digests: The digest of every CHUNK_BYTES of it, one after the other.

    Raises:
        DamagedShardFileError: The file is missing, or has another size or content. Every process finds the same.
        DataError: A fault that may concern one process alone (a stale handle, no descriptors left) persists.
    """

    def __init__(self, path: Path, where: str, num_bytes: int, digests: bytes) -> None:
        self._where, self._num_bytes, self._digests = where, num_bytes, digests
        self._verified = np.zeros(0, dtype=bool)
        self._stamp = -1
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a named pipe would block otherwise
            self._file = self._with_retries(lambda: os.open(path, flags))
        except FileNotFoundError as error:
            raise DamagedShardFileError(
                f"{where}: the manifest names it but it cannot be opened ({error.strerror}); copy it again"
            ) from error
        try:
            self._notice_changes()
            self.content = self._with_retries(lambda: mmap.mmap(self._file, num_bytes, access=mmap.ACCESS_READ))
        except BaseException:
            os.close(self._file)
            raise

    def verify(self, first_byte: NDArray[np.int64], last_byte: NDArray[np.int64]) -> None:
        """Check every chunk that the ranges [first_byte, last_byte] touch; both ends are inclusive, [N] each.

        Raises:
            DamagedShardFileError: A chunk has another digest. The message names its offset and both digests.
        """
        self._notice_changes()
        touched = np.zeros(len(self._verified) + 1, dtype=np.int64)
        np.add.at(touched, first_byte // CHUNK_BYTES, 1)
        np.add.at(touched, last_byte // CHUNK_BYTES + 1, -1)
        for chunk in np.flatnonzero((np.cumsum(touched[:-1]) > 0) & ~self._verified):
            self._verify_chunk(int(chunk))

    def verify_all(self) -> None:
        """Check the whole file."""
        self.verify(np.array([0]), np.array([self._num_bytes - 1]))

    def close(self) -> None:
        """Close the file. The map is freed with the last array that views it."""
        os.close(self._file)

    def _verify_chunk(self, chunk: int) -> None:
        start = chunk * CHUNK_BYTES
        found = chunk_digest(memoryview(self.content)[start : start + CHUNK_BYTES])
        expected = self._digests[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]
        if found != expected:
            raise DamagedShardFileError(
                f"{self._where}: damaged between byte {start} and {start + CHUNK_BYTES}: digest {found.hex()}, "
                f"expected {expected.hex()}; copy or prepare this shard again"
            )
        self._verified[chunk] = True

    def _notice_changes(self) -> None:
        """Raise if the size changed, since a read past the end kills the process. After a write, recheck all chunks."""
        status = self._with_retries(lambda: os.fstat(self._file))
        if not stat.S_ISREG(status.st_mode):
            raise DamagedShardFileError(f"{self._where}: is no regular file; put the shard itself there")
        if status.st_size != self._num_bytes:
            raise DamagedShardFileError(
                f"{self._where}: has {status.st_size} bytes, expected {self._num_bytes}; copy or prepare it again"
            )
        if status.st_mtime_ns != self._stamp:
            self._stamp = status.st_mtime_ns
            self._verified = np.zeros(-(-self._num_bytes // CHUNK_BYTES), dtype=bool)

    def _with_retries(self, call: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                raise FetchError(error.strerror or str(error)) from error

        remedy = "check the disk, the file's permissions and the limit on open files, then start again"
        return with_retries(attempt, _ATTEMPTS, self._where, "could not be read", remedy)
