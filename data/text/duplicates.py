"""Find duplicate documents by their hashes, which are stored in one file per part of the input."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])
_BUCKET_DOCUMENTS = 16 << 20


def read_hashes(file: Path) -> NDArray:
    """Return the 16-byte hashes of a part's documents, as pairs of numbers `high` (the first 8 bytes) and `low`."""
    return np.fromfile(file, dtype=_HASH_DTYPE)


def first_occurrences(files: Sequence[Path], counts: Sequence[int]) -> NDArray[np.bool_]:
    """Return a flag for each document: whether no earlier document has the same hash.

    Hashes are compared one bucket at a time to bound the memory. It takes about 50 bytes per document of a bucket, and
    1 byte per document in all.

    Args:
        files: The hash file of each part.
        counts: The number of documents of each part.

    Returns:
        Flags of all documents in order, [sum(counts)].
    """
    keep = np.zeros(sum(counts), dtype=bool)
    starts = np.cumsum([0, *counts])
    num_buckets = -(-sum(counts) // _BUCKET_DOCUMENTS)
    for bucket in range(num_buckets):
        hashes, places = [], []
        for file, start in zip(files, starts[:-1], strict=True):
            of_part = read_hashes(file)
            here = np.flatnonzero(of_part["low"] % np.uint64(num_buckets) == bucket)
            hashes.append(of_part[here])
            places.append(here + start)
        together, place = np.concatenate(hashes), np.concatenate(places)
        by_hash = np.lexsort((together["low"], together["high"]))  # stable: equal hashes stay in document order
        ordered = together[by_hash]
        is_first = np.append(True, ordered[1:] != ordered[:-1])
        keep[place[by_hash[is_first]]] = True
    return keep
