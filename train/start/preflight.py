"""What can be said against a run before any device is touched."""

from data.shards.manifest import Manifest
from data.stream.dataset import open_dataset_once
from train.checkpoint.folder import Folder
from train.config import Config, ConfigError, dataset_faults, world_faults


def preflight(config: Config, world_size: int) -> Manifest:
    """The run's dataset, once configuration, number of processes and dataset fit together.

    Raises:
        ConfigError: they do not; a line for each fault.
        DataError: the dataset cannot be read.
    """
    manifest = open_dataset_once(config.data.path, config.data.read_options())
    faults = world_faults(config, world_size) + dataset_faults(config, manifest) + checkpoint_faults(config)
    if faults:
        raise ConfigError(faults)
    return manifest


def checkpoint_faults(config: Config) -> list[str]:
    """Whether this installation knows the kind of place that checkpoints are to go to; nothing is written."""
    try:
        Folder(config.checkpoint_folder)
    except (ValueError, ImportError) as error:
        return [
            f"checkpoint.path = {config.checkpoint_folder!r} cannot be used ({error}); name a folder or an address "
            "whose fsspec package is installed"
        ]
    return []
