"""What can be said against a run before any device is touched."""

from data.manifest import Manifest, load_manifest
from train.config import Config, ConfigError, dataset_faults, world_faults


def preflight(config: Config, world_size: int) -> Manifest:
    """The run's dataset, once configuration, number of processes and dataset fit together.

    Raises:
        ConfigError: they do not; a line for each fault.
        DataError: the dataset cannot be read.
    """
    manifest = load_manifest(config.data.path, config.data.read_options())
    faults = world_faults(config, world_size) + dataset_faults(config, manifest)
    if faults:
        raise ConfigError(faults)
    return manifest
