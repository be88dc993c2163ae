"""Find which documents a stretch of a shard comes from.

A shard of tokens has a list beside it, NAME.documents.jsonl.gz. For each document with tokens in the shard, it holds a
line [first token, source]. The first token is negative if the document began in the shard before. A shard of text needs
no list: its index (data/shards/text_shard.py) records the byte at which each document begins.
"""

import bisect
import functools
import gzip
import io
import json
import zlib
from collections.abc import Iterable

import numpy as np

from data.errors import DataError, printable
from data.fetch.sources import Source
from data.shards.manifest import Manifest, ShardInfo
from data.shards.text_shard import read_text_sidecar

SUFFIX = ".documents.jsonl.gz"
_MAX_DOCUMENT_LIST_BYTES = 256 << 20


def pack_document_list(entries: Iterable[tuple[int, str]]) -> bytes:
    """Return the file content of a list of (first token, source). The same entries give the same bytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        for entry in entries:
            file.write(json.dumps(entry).encode() + b"\n")
    return packed.getvalue()


def documents_of(manifest: Manifest, shard: ShardInfo, first: int, last: int) -> list[str]:
    """Return the sources of the documents that have tokens in [first, last) of a shard."""
    if manifest.content == "text":
        _, documents = read_text_sidecar(manifest, shard)
        begin, end = np.searchsorted(np.cumsum(documents[:, 2]), (first, last - 1), side="right")
        return [f"the document at byte {offset}" for offset in documents[begin : end + 1, 0]]
    starts, sources = _document_list(manifest.source, shard.name.removesuffix(".tar") + SUFFIX)
    begin = max(bisect.bisect_right(starts, first) - 1, 0)
    return sources[begin : bisect.bisect_left(starts, last)]


@functools.lru_cache(maxsize=64)
def _document_list(source: Source, name: str) -> tuple[list[int], list[str]]:
    """Return the first tokens and the sources of a shard's documents; raise DataError if the list is damaged."""
    where = source.describe(name)
    packed = source.read(name, _MAX_DOCUMENT_LIST_BYTES)
    try:
        lines = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(_MAX_DOCUMENT_LIST_BYTES + 1)
        if len(lines) > _MAX_DOCUMENT_LIST_BYTES:
            raise ValueError(f"more than {_MAX_DOCUMENT_LIST_BYTES} bytes")
        entries = [(int(start), str(origin)) for start, origin in map(json.loads, lines.splitlines())]
        if not entries:
            raise ValueError("it is empty")
    except (ValueError, TypeError, RecursionError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{where}: damaged ({error}); copy or prepare the dataset again") from error
    return [start for start, _ in entries], [printable(origin) for _, origin in entries]
