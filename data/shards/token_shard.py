"""Read rows of tokens from a shard of tokens."""

import hashlib

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from data.fetch.transport import WrongContentError, with_retries
from data.shards.manifest import Manifest, ShardInfo
from data.shards.tar_layout import BLOCK_TOKENS, DTYPES, HEADER_BYTES, digests_bytes
from data.shards.verified_file import VerifiedFile

_SIDECAR_ATTEMPTS = 2


class TokenShard:
    """An open shard of tokens. Opening raises DamagedShardError if a file is missing or does not match the manifest."""

    def __init__(self, manifest: Manifest, shard: ShardInfo) -> None:
        path = manifest.shard_source.fetch(shard.name, shard.sha256, shard.num_bytes)
        digests = read_sidecar(manifest, shard, digests_bytes(shard.num_bytes))
        self._item_bytes = DTYPES[manifest.token_dtype]
        self._file = VerifiedFile(path, manifest.shard_source.describe(shard.name), shard.num_bytes, digests)
        self._tokens = np.frombuffer(self._file.content, dtype=f"<u{self._item_bytes}")

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray:
        """Return tokens [start, start + length) for each start: [len(starts), length], in the shard's dtype.

        Raises:
            DamagedShardError: A byte has changed since preparation. The message names shard, offset and both digests.
        """
        ends = starts + length - 1
        first_byte, last_byte = (self._elements(place) * self._item_bytes for place in (starts, ends))
        self._file.verify(first_byte, last_byte + self._item_bytes - 1)
        rows = np.empty((len(starts), length), dtype=self._tokens.dtype)
        within_block = starts // BLOCK_TOKENS == ends // BLOCK_TOKENS
        if within_block.any():
            stride = self._tokens.strides[0]
            shape = (len(self._tokens) - length + 1, length)
            every_row = as_strided(self._tokens, shape, (stride, stride), writeable=False)
            rows[within_block] = every_row[self._elements(starts[within_block])]
        across = starts[~within_block]
        if len(across):
            rows[~within_block] = self._tokens[self._elements(across[:, None] + np.arange(length))]
        return rows

    def verify_all(self) -> None:
        """Check the whole shard; raise DamagedShardError as `rows` does."""
        self._file.verify_all()

    def close(self) -> None:
        """Close the shard's file."""
        self._file.close()

    def _elements(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of each token in the whole file viewed as one array of tokens, headers included."""
        return tokens + (tokens // BLOCK_TOKENS + 1) * (HEADER_BYTES // self._item_bytes)


def read_sidecar(manifest: Manifest, shard: ShardInfo, max_bytes: int) -> bytes:
    """Read the digest list beside a shard; raise DamagedShardError if it does not match the manifest."""

    def attempt() -> bytes:
        content = manifest.source.read(shard.digests_name, max_bytes)
        found = hashlib.sha256(content).hexdigest()
        if found != shard.digests_sha256:
            raise WrongContentError(f"sha256 {found}, expected {shard.digests_sha256}")
        return content

    return with_retries(attempt, _SIDECAR_ATTEMPTS, manifest.source.describe(shard.digests_name))
