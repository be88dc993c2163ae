"""What a configuration would run, without a GPU, a process group or a weight."""

import json
from collections import Counter

from data.errors import DataError
from data.shards.manifest import SPLITS, Manifest
from data.stream.dataset import open_dataset
from model.config import ModelConfig
from model.initialize import global_shapes
from parallel.config import padded_vocab_size
from train.config import Config, ConfigError, dataset_faults, world_faults
from train.config.schedule import warmup_steps

KINDS = {
    "word embedding": ("embedding.word.",),
    "position embedding": ("embedding.position.",),
    "attention": (".attention.query_key_value.", ".attention.output.", ".attention.query_bias", ".attention.key_bias"),
    "temperatures": (".temperature_parameter",),
    "thresholds": (".threshold",),
    "FFN": (".ffn.fused.", ".ffn.up.", ".ffn.down."),
    "FFN scaling": (".ffn.alpha", ".ffn.beta"),
    "norms": ("norm.",),
    "head": ("head.weight",),
}


def parameter_counts(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters of the unpadded model by kind; a tied head counts with the word embedding."""
    counts: Counter[str] = Counter()
    for name, shape in global_shapes(model, vocab_size).items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        counts[kind] += shape.numel()
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def print_plan(config: Config, world_size: int | None) -> None:
    """Prints configuration, parameters, steps and ranks.

    Raises:
        ConfigError: the sizes do not fit the world, or neither dataset nor data.planned_vocab_size tells the
        vocabulary.
    """
    ranks = config.parallel.ranks_per_batch if world_size is None else world_size
    manifest = dataset_if_there(config)
    faults = world_faults(config, ranks) + ([] if manifest is None else dataset_faults(config, manifest))
    if faults:
        raise ConfigError(faults)
    vocab_size, source = vocabulary(config, manifest)
    grid = config.grid(ranks)
    counts = parameter_counts(config.model, vocab_size)
    print(json.dumps(config.as_dict(), indent=2))
    padded = padded_vocab_size(vocab_size, grid.tp)
    print(f"\nvocabulary        {vocab_size:,} tokens (from {source}), padded to {padded:,}")
    print(f"parameters        {sum(counts.values()):,}")
    for kind, count in counts.items():
        print(f"  {kind:<18}{count:>16,}")
    print(
        f"steps             {config.train_steps:,} ({warmup_steps(config.optimizer, config.train_steps):,} of warm-up)"
    )
    print(f"tokens            {config.train_steps * config.tokens_per_step:,} ({config.tokens_per_step:,} a step)")
    if manifest is not None:
        train, validation = (manifest.num_samples(split, config.model.seq_length) for split in SPLITS)
        epochs = config.train_steps * config.training.global_batch_size / max(train, 1)
        print(f"samples           {train:,} to train on ({epochs:.2f} epochs), {validation:,} to validate on")
    print(
        f"a step            {config.training.global_batch_size} sequences = {config.num_micro_batches(ranks)} "
        f"micro-batches of "
        f"{config.training.micro_batch_size} on {grid.dp} data-parallel ranks"
    )
    print(
        f"ranks             {ranks} = {grid.pp} stages x {grid.dp} replicas x {grid.cp} context shards x "
        f"{grid.tp} tensor shards\n"
    )
    print(grid.table(config.model.num_layers))


def vocabulary(config: Config, manifest: Manifest | None) -> tuple[int, str]:
    """The number of tokens, and where it is known from."""
    if manifest is not None:
        return manifest.vocab_size, config.data.path
    assert config.data.planned_vocab_size is not None
    return config.data.planned_vocab_size, "data.planned_vocab_size; the dataset cannot be read yet"


def dataset_if_there(config: Config) -> Manifest | None:
    """The dataset, or None where it cannot be read yet and the configuration says what to assume.

    Raises:
        ConfigError: neither the dataset nor data.planned_vocab_size tells the vocabulary.
    """
    try:
        return open_dataset(config.data.path, config.data.read_options())
    except DataError as error:
        if config.data.planned_vocab_size is None:
            raise ConfigError([f"{error} (or set data.planned_vocab_size to plan without the dataset)"]) from None
        return None
