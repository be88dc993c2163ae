"""Checks a run before any device is used."""

from data.shards.manifest import Manifest
from data.stream.dataset import open_dataset_once
from train.checkpoint.folder import Folder
from train.config import Config, ConfigError, dataset_faults, world_faults


def preflight(config: Config, world_size: int) -> Manifest:
    """Check that configuration, number of processes and dataset fit together. Return the dataset.

    Raises:
        ConfigError: they do not; it has one line per fault.
        DataError: the dataset cannot be read.
    """
    manifest = open_dataset_once(config.data.path, config.data.read_options())
    faults = world_faults(config, world_size) + dataset_faults(config, manifest) + checkpoint_faults(config)
    if faults:
        raise ConfigError(faults)
    return manifest


def checkpoint_faults(config: Config) -> list[str]:
    """Return a fault if this installation cannot write to the address of checkpoints. Nothing is written."""
    try:
        Folder(config.checkpoint_folder)
    except (OSError, ValueError, ImportError) as error:
        return [
            f"checkpoint.path = {config.checkpoint_folder!r} cannot be used ({error}); name a folder or an address "
            "that answers and whose fsspec package is installed"
        ]
    return []
