"""Finds the vocabulary of a configuration, also if its dataset is not prepared yet."""

from data.errors import DataError
from data.shards.manifest import Manifest
from data.stream.dataset import open_dataset
from train.config.config import Config
from train.config.tree import ConfigError


def dataset_if_there(config: Config) -> Manifest | None:
    """Open the dataset; return None if it cannot be read but `data.planned_vocab_size` is set.

    Raises:
        ConfigError: the dataset cannot be read, and `data.planned_vocab_size` is null.
    """
    try:
        return open_dataset(config.data.path, config.data.read_options())
    except DataError as error:
        if config.data.planned_vocab_size is None:
            raise ConfigError([f"{error} (or set data.planned_vocab_size to plan without the dataset)"]) from None
        return None


def vocabulary(config: Config, manifest: Manifest | None) -> tuple[int, str]:
    """Return the number of tokens and where that number comes from.

    Args:
        manifest: from `dataset_if_there`.
    """
    if manifest is not None:
        return manifest.vocab_size, config.data.path
    assert config.data.planned_vocab_size is not None
    return config.data.planned_vocab_size, "data.planned_vocab_size; the dataset cannot be read yet"
