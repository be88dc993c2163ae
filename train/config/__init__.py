"""The configuration: sections, how they are read from JSON and the command line, and the learning-rate schedule."""

from train.config.config import (
    DERIVED_DEEPSPEED_KEYS,
    Config,
    allows_commands,
    config_from_dict,
    dataset_faults,
    load_config,
    section_faults,
    world_faults,
)
from train.config.tree import ConfigError

__all__ = [
    "DERIVED_DEEPSPEED_KEYS",
    "Config",
    "ConfigError",
    "allows_commands",
    "config_from_dict",
    "dataset_faults",
    "load_config",
    "section_faults",
    "world_faults",
]
