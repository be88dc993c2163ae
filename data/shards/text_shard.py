"""Read rows of tokens from a webdataset shard of raw text, tokenizing on the fly.

The index (data/shards/text_index.py) records where each document lies and how many tokens it makes. So token t is found
without reading what comes before it. Samples, order and checks are the same as for a shard of tokens.

The index is one file beside the shard. It holds the digests of the shard's chunks, then one row of four int64 per
document: (OFFSET, SIZE, TOKENS, IS_JSON). TOKENS includes the end-of-document token.

Reading a sample tokenizes every document that it touches. The documents used last are kept for the samples that
follow, up to a million tokens per shard.
"""

import functools
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DamagedShardError, DataError
from data.shards.manifest import Manifest, ShardInfo
from data.shards.tar_layout import HEADER_BYTES, digests_bytes
from data.shards.token_shard import read_sidecar
from data.shards.tokenizer import Tokenizer
from data.shards.verified_file import VerifiedFile

COLUMNS = 4
MAX_DOCUMENT_BYTES = 64 << 20
_KEPT_TOKENS = 1 << 20


class TextShard:
    """An open shard of text. Opening raises DamagedShardError if a file is missing or does not match the manifest."""

    def __init__(self, manifest: Manifest, shard: ShardInfo) -> None:
        self._where = manifest.shard_source.describe(shard.name)
        path = manifest.shard_source.fetch(shard.name, shard.sha256, shard.num_bytes)
        digests, self._documents = read_text_sidecar(manifest, shard)
        self._ends = np.cumsum(self._documents[:, 2])
        self._file = VerifiedFile(path, self._where, shard.num_bytes, digests)
        self._manifest = manifest
        self._tokenizer = _tokenizer(manifest.tokenizer_path, manifest.tokenizer_sha256)
        self._kept: OrderedDict[int, NDArray] = OrderedDict()
        self._num_kept = 0

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray:
        """Return tokens [start, start + length) for each start: [len(starts), length], in the manifest's dtype.

        Raises:
            DamagedShardError: The shard is not what was indexed.
            DataError: The index itself is wrong.
        """
        rows = np.empty((len(starts), length), dtype=self._manifest.token_dtype)
        for row, start in zip(rows, starts, strict=True):
            first, last = np.searchsorted(self._ends, (start, start + length - 1), side="right")
            tokens = np.concatenate([self._tokens_of(int(number)) for number in range(first, last + 1)])
            skipped = start - (self._ends[first] - self._documents[first, 2])
            row[:] = tokens[skipped : skipped + length]
        return rows

    def verify_all(self) -> None:
        """Check the whole shard; raise DamagedShardError as `rows` does."""
        self._file.verify_all()

    def close(self) -> None:
        """Close the shard's file."""
        self._file.close()

    def _tokens_of(self, number: int) -> NDArray:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        tokens = self._kept[number] = self._tokenize(number)
        self._num_kept += len(tokens)
        while self._num_kept > _KEPT_TOKENS and len(self._kept) > 1:
            self._num_kept -= len(self._kept.popitem(last=False)[1])
        return tokens

    def _tokenize(self, number: int) -> NDArray:
        offset, size, num_tokens, is_json = (int(value) for value in self._documents[number])
        self._file.verify(np.array([offset]), np.array([max(offset, offset + size - 1)]))
        where = f"{self._where}: the document at byte {offset}"
        try:
            text = member_text(self._file.content[offset : offset + size], bool(is_json), self._manifest.text_key)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where} is not text ({error}), so the index is wrong; index the shards again") from error
        ids = [*self._tokenizer.encode(text), self._manifest.end_of_document]
        if len(ids) != num_tokens:
            raise DataError(
                f"{where} makes {len(ids)} tokens, {num_tokens} when it was indexed; index the shards again"
            )
        return np.array(ids, dtype=self._manifest.token_dtype)


def read_text_sidecar(manifest: Manifest, shard: ShardInfo) -> tuple[bytes, NDArray[np.int64]]:
    """Read the index of a text shard.

    Returns:
        The digests of the shard's chunks, and its documents as rows (OFFSET, SIZE, TOKENS, IS_JSON), [documents, 4].

    Raises:
        DamagedShardError: The index is damaged, or lists documents that the shard cannot hold.
    """
    num_digests = digests_bytes(shard.num_bytes)
    most_documents = min(shard.num_tokens, shard.num_bytes // HEADER_BYTES)
    content = read_sidecar(manifest, shard, num_digests + most_documents * COLUMNS * 8)
    rows = content[num_digests:]
    documents = np.frombuffer(rows[: len(rows) // (COLUMNS * 8) * COLUMNS * 8], dtype="<i8").reshape(-1, COLUMNS)
    offset, size, tokens, _ = documents.T
    is_sound = (
        documents.nbytes == len(rows)
        and (offset >= 0).all()
        and (size >= 0).all()
        and (size <= MAX_DOCUMENT_BYTES).all()
        and (offset <= shard.num_bytes - size).all()
        and (tokens >= 1).all()
        and (tokens <= size + 1).all()
        and tokens.sum() == shard.num_tokens
    )
    if not is_sound:
        where = manifest.source.describe(shard.digests_name)
        raise DamagedShardError(f"{where}: lists documents that the shard cannot hold; index the shards again")
    return content[:num_digests], documents


def member_text(raw: bytes, is_json: bool, text_key: str) -> str:
    """Return the text of a .txt or .json member; raise ValueError, KeyError or TypeError if it holds none."""
    try:
        text = json.loads(raw)[text_key] if is_json else raw.decode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(text, str):
        raise TypeError(f'"{text_key}" holds {type(text).__name__}')
    return text


@functools.lru_cache(maxsize=8)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    return Tokenizer(path)
