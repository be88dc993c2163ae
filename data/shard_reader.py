"""Read rows of tokens out of a shard, checking every byte that is read."""

import hashlib
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import Manifest, ShardInfo
from data.tar_layout import BLOCK_TOKENS, CHUNK_BYTES, DIGEST_BYTES, DTYPES, HEADER_BYTES, chunk_digest, digests_bytes


class ShardReader:
    """An open shard. The file is mapped, so memory is one digest (16 bytes) and one flag for every 16 KiB of it.

    A chunk is checked when a row first touches it, and again if the file has changed on disk since.
    """

    def __init__(self, manifest: Manifest, shard: ShardInfo) -> None:
        self.info = shard
        self._where = manifest.source.describe(shard.name)
        path = manifest.source.fetch(shard.name, shard.sha256, shard.num_bytes)
        self._digests = _read_digests(manifest, shard)
        self._item_bytes = DTYPES[manifest.token_dtype]
        self._file = _open(path, self._where)
        self._stamp: tuple[int, int] | None = None
        self._require_unchanged_size()
        self._map = mmap.mmap(self._file, shard.num_bytes, access=mmap.ACCESS_READ)
        self._tokens = np.frombuffer(self._map, dtype=f"<u{self._item_bytes}")

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray:
        """Tokens [start, start + length) for every start: an array [len(starts), length] of the shard's own type.

        Raises DataError naming the shard, the offset and both digests if a byte is not what was prepared.
        """
        ends = starts + length - 1
        self._verify(self._elements(starts) * self._item_bytes, (self._elements(ends) + 1) * self._item_bytes - 1)
        rows = np.empty((len(starts), length), dtype=self._tokens.dtype)
        within_block = starts // BLOCK_TOKENS == ends // BLOCK_TOKENS
        stride = self._tokens.strides[0]
        every_row = as_strided(
            self._tokens, (len(self._tokens) - length + 1, length), (stride, stride), writeable=False
        )
        rows[within_block] = every_row[self._elements(starts[within_block])]
        across = starts[~within_block]
        if len(across):
            rows[~within_block] = self._tokens[self._elements(across[:, None] + np.arange(length))]
        return rows

    def verify(self) -> None:
        """Check the whole shard; raises DataError as `rows` does."""
        self._verify(np.array([0]), np.array([self.info.num_bytes - 1]))

    def close(self) -> None:
        """Let go of the file; rows that were handed out are copies and stay valid."""
        os.close(self._file)
        del self._tokens
        self._map.close()

    def _elements(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of each token in the file seen as one array of tokens, headers included."""
        return tokens + (tokens // BLOCK_TOKENS + 1) * (HEADER_BYTES // self._item_bytes)

    def _verify(self, first_byte: NDArray[np.int64], last_byte: NDArray[np.int64]) -> None:
        self._require_unchanged_size()
        touched = np.zeros(len(self._verified) + 1, dtype=np.int64)
        np.add.at(touched, first_byte // CHUNK_BYTES, 1)
        np.add.at(touched, last_byte // CHUNK_BYTES + 1, -1)
        for chunk in np.flatnonzero((np.cumsum(touched[:-1]) > 0) & ~self._verified):
            self._verify_chunk(int(chunk))

    def _verify_chunk(self, chunk: int) -> None:
        start = chunk * CHUNK_BYTES
        found = chunk_digest(memoryview(self._map)[start : start + CHUNK_BYTES])
        expected = self._digests[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]
        if found != expected:
            raise DataError(
                f"{self._where}: damaged between byte {start} and {start + CHUNK_BYTES}: digest {found.hex()}, "
                f"expected {expected.hex()}; copy or prepare this shard again"
            )
        self._verified[chunk] = True

    def _require_unchanged_size(self) -> None:
        """A file that shrank would kill the process on access; one that was written to has to be checked anew."""
        status = os.fstat(self._file)
        if status.st_size != self.info.num_bytes:
            raise DataError(
                f"{self._where}: has {status.st_size} bytes, expected {self.info.num_bytes}; copy or prepare it again"
            )
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._stamp = stamp
            self._verified = np.zeros(-(-self.info.num_bytes // CHUNK_BYTES), dtype=bool)


def _open(path: Path, where: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(
            f"{where}: the manifest names it but it cannot be opened ({error.strerror}); copy it again"
        ) from error


def _read_digests(manifest: Manifest, shard: ShardInfo) -> bytes:
    where = manifest.source.describe(shard.digests_name)
    digests = manifest.source.read(shard.digests_name, digests_bytes(shard.num_bytes))
    found = hashlib.sha256(digests).hexdigest()
    if found != shard.digests_sha256:
        raise DataError(f"{where}: damaged: sha256 {found}, expected {shard.digests_sha256}; copy or prepare it again")
    return digests
