"""Write a shard of tokens: the tar, its digest list, and its entry for the manifest."""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.shards.manifest import ShardInfo
from data.shards.tar_layout import (
    BLOCK_TOKENS,
    CHUNK_BYTES,
    DTYPES,
    MEMBER_SUFFIX,
    chunk_digest,
    payload_bytes,
    shard_bytes,
)


def write_shard(path: Path, tokens: NDArray, token_dtype: str) -> ShardInfo:
    """Write a shard and the digest list beside it. A file under its final name is always complete.

    Args:
        path: The shard's file, ending in .tar.
        tokens: Token ids, [N], in memory or mapped.
        token_dtype: "uint16" or "uint32".

    Returns:
        The shard's entry for the manifest.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    whole = hashlib.sha256()
    digests = bytearray()
    pending = bytearray()
    partial = path.with_suffix(".tar.partial")
    with partial.open("wb") as file:
        for piece in _tar_pieces(path.stem, tokens, token_dtype):
            file.write(piece)
            whole.update(piece)
            pending += piece
            while len(pending) >= CHUNK_BYTES:
                digests += chunk_digest(bytes(pending[:CHUNK_BYTES]))
                del pending[:CHUNK_BYTES]
        file.flush()
        os.fsync(file.fileno())
    if pending:
        digests += chunk_digest(bytes(pending))
    info = ShardInfo(
        name=path.name,
        num_tokens=len(tokens),
        num_bytes=partial.stat().st_size,
        sha256=whole.hexdigest(),
        digests_sha256=hashlib.sha256(digests).hexdigest(),
    )
    digests_partial = path.with_suffix(".digests.partial")
    digests_partial.write_bytes(digests)
    digests_partial.rename(path.parent / info.digests_name)
    partial.rename(path)
    return info


def _tar_pieces(stem: str, tokens: NDArray, token_dtype: str) -> Iterator[bytes]:
    written = 0
    for number, start in enumerate(range(0, len(tokens), BLOCK_TOKENS)):
        block = np.ascontiguousarray(tokens[start : start + BLOCK_TOKENS]).astype(f"<u{DTYPES[token_dtype]}")
        header = tarfile.TarInfo(f"{stem}-{number:06d}.{MEMBER_SUFFIX}")
        header.size = block.nbytes
        yield header.tobuf(tarfile.USTAR_FORMAT)
        yield block.tobytes().ljust(payload_bytes(len(block), token_dtype), b"\0")
        written += tarfile.BLOCKSIZE + payload_bytes(len(block), token_dtype)
    yield bytes(shard_bytes(len(tokens), token_dtype) - written)
