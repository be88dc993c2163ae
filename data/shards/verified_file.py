"""A file of which every byte is checked before it is used."""

import mmap
import os
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
    """A mapped file; memory is one digest (16 bytes) and one flag for each 16 KiB of it.

    A chunk is checked when it is first asked for, and again if the file has been written to since.

    Damaged is a file that is absent, of another size or of other content: whoever looks finds the same. What the system
    may tell one process alone (a stale handle, no descriptors left) is tried again, then a DataError.
    """

    def __init__(self, path: Path, where: str, num_bytes: int, digests: bytes) -> None:
        self._where, self._num_bytes, self._digests = where, num_bytes, digests
        self._verified = np.zeros(0, dtype=bool)
        self._stamp = -1
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a named pipe would wait for ever
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
        """Check the chunks under the inclusive ranges of bytes.

        Raises DamagedShardFileError, which names offset and digests.
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
        """Let go of the file. The map itself goes with the last array that looks into it."""
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
        """A file that shrank would kill the process on access; one that was written to has to be checked anew."""
        status = self._with_retries(lambda: os.fstat(self._file))
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
