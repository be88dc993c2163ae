"""Where a token lies in a shard, by arithmetic.

A shard is an uncompressed tar whose members each hold BLOCK_TOKENS tokens (the last one the rest), little-endian:

    512-byte header | 65,536 tokens | 512-byte header | 65,536 tokens | ... | zeros to a multiple of 10,240

so token t lies at byte 512 * (t // 65536 + 1) + t * itemsize, and no list of offsets is needed. Any tar reader opens
it; webdataset yields one sample a member, with the tokens under the key "tokens".

The digest list beside a shard holds sha256, cut to 16 bytes, of every CHUNK_BYTES of the file, headers included, so
that a few chunks can be checked without reading the rest and no byte of the file escapes.
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
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def payload_bytes(num_tokens: int, token_dtype: str) -> int:
    """Bytes of a member's data, padded to the tar's 512."""
    return -(-num_tokens * DTYPES[token_dtype] // HEADER_BYTES) * HEADER_BYTES


def shard_bytes(num_tokens: int, token_dtype: str) -> int:
    """Size of a shard file of `num_tokens` tokens."""
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    content = num_blocks * HEADER_BYTES + payload_bytes(num_tokens, token_dtype)
    return -(-(content + 2 * HEADER_BYTES) // RECORD_BYTES) * RECORD_BYTES


def digests_bytes(num_bytes: int) -> int:
    """Size of the digest list of a shard of `num_bytes`."""
    return -(-num_bytes // CHUNK_BYTES) * DIGEST_BYTES


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()[:DIGEST_BYTES]
