"""Open a dataset by its address: a prepared folder, local or remote, or a mixture of several."""

import functools
from pathlib import Path

from data.fetch.sources import ReadOptions
from data.files.address import local_path
from data.shards.manifest import Manifest, load_manifest
from data.stream.mixture import load_mixture


def open_dataset(address: str | Path, options: ReadOptions | None = None) -> Manifest:
    """Read and check the description of a dataset, without opening a shard.

    Args:
        address: A folder, a remote address (data/fetch/sources.py), or a mixture's .json file (data/stream/mixture.py).
        options: How files are fetched and checked.

    Returns:
        The dataset's manifest. A mixture is a manifest too: its sizes are sums, and `datasets` lists its members.

    Raises:
        DataError: The dataset cannot be read. One line names the field, its value and the remedy.
    """
    options = options or ReadOptions()
    if str(address).endswith(".json"):
        return load_mixture(local_path(address), options)
    return load_manifest(address, options)


open_dataset_once = functools.lru_cache(maxsize=2)(open_dataset)
"""`open_dataset`, cached: a run keeps the manifest that it started with, even if the files are replaced meanwhile."""
