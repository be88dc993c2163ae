"""Opens a dataset by its address, whatever it is: a prepared folder, near or far, or a mixture of several."""

import functools
from pathlib import Path

from data.fetch.sources import ReadOptions
from data.shards.manifest import Manifest, load_manifest
from data.stream.mixture import load_mixture


def open_dataset(address: str | Path, options: ReadOptions | None = None) -> Manifest:
    """Read and check what describes a dataset; no shard is opened.

    Args:
        address: a folder, an address (data/fetch/sources.py), or a mixture's .json file (data/stream/mixture.py).
        options: how files are fetched and checked.

    Returns:
        A manifest. A mixture is one too: its sizes are sums, and `datasets` are those that it is read from.

    Raises:
        DataError: one line that names the field, what it holds and the remedy.
    """
    options = options or ReadOptions()
    if str(address).endswith(".json"):
        return load_mixture(Path(address), options)
    return load_manifest(address, options)


open_dataset_once = functools.lru_cache(maxsize=2)(open_dataset)
"""`open_dataset`, but once per process: what replaces a dataset's files later is not what a run began with."""
