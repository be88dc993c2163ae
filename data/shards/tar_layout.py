"""Compute where a token lies in a shard.

A shard is an uncompressed tar. Each member holds BLOCK_TOKENS little-endian tokens, and the last one holds the rest:

    512-byte header | 65,536 tokens | 512-byte header | 65,536 tokens | ... | zeros to a multiple of 10,240

So token t lies at byte 512 * (t // 65536 + 1) + t * itemsize, and no list of offsets is needed. Any tar reader opens
such a file. webdataset yields one sample per member, with the tokens under the key "tokens".

The digest list beside a shard holds the sha256 of every CHUNK_BYTES of the file, cut to 16 bytes. It covers headers
too, so every byte is checked. A few chunks can be checked without reading the rest.
"""

import hashlib

BLOCK_TOKENS = 65_536
HEADER_BYTES = 512
RECORD_BYTES = 10_240
CHUNK_BYTES = 16_384
DIGEST_BYTES = 16
DTYPES = {"uint16": 2, "uint32": 4}
MEMBER_SUFFIX = "tokens"


def token_dtype_for(vocab_size: int) -> str:
    """Return the smallest dtype that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def payload_bytes(num_tokens: int, token_dtype: str) -> int:
    """Return the bytes of a member's data, padded to the tar's 512."""
    return -(-num_tokens * DTYPES[token_dtype] // HEADER_BYTES) * HEADER_BYTES


def shard_bytes(num_tokens: int, token_dtype: str) -> int:
    """Return the size in bytes of a shard file of `num_tokens` tokens."""
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    content = num_blocks * HEADER_BYTES + payload_bytes(num_tokens, token_dtype)
    return -(-(content + 2 * HEADER_BYTES) // RECORD_BYTES) * RECORD_BYTES


def digests_bytes(num_bytes: int) -> int:
    """Return the size in bytes of the digest list of a shard of `num_bytes`."""
    return -(-num_bytes // CHUNK_BYTES) * DIGEST_BYTES


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    """Return the digest of one chunk, DIGEST_BYTES long."""
    return hashlib.sha256(chunk).digest()[:DIGEST_BYTES]
