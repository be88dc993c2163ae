"""Builds what is timed: a training step of this project's engine, or of a plain PyTorch GPT-2, on every rank.

The learning rate is 0. The work is the same, and no contender can diverge and have its steps skipped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from data.errors import DataError
from data.shards.manifest import Manifest
from data.stream.dataset import open_dataset_once
from parallel.grid import RankGrid
from train.config import Config, config_from_dict

if TYPE_CHECKING:
    from parallel.micro_batch import MicroBatch

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
DEFAULT_VOCABULARY = 32_000
"""Of random tokens, unless data.planned_vocab_size is set."""


class Report(Protocol):
    """What a step reports: a `StepReport` of ours that is pending, or a `PeerReport`."""

    @property
    def accepted(self) -> torch.Tensor:
        """Whether loss and gradients are finite, on the device."""

    def wait(self) -> Any:
        """Wait for the device; the result has `cross_entropy`, the mean over all ranks in nats a token."""


@dataclass
class Contender:
    """A step to time on this rank; `config` is the contender's own."""

    name: str
    config: Config
    vocab_size: int
    step: Callable[[], Report]


def as_architecture(config: Config, architecture: str) -> Config:
    """Return the configuration with a model of the same sizes and another architecture."""
    tree = config.as_dict()
    tree["model"] = {**{key: tree["model"][key] for key in SIZES}, "architecture": architecture}
    return config_from_dict(tree)


def engine_contender(
    name: str, config: Config, vocab_size: int, manifest: Manifest | None, groups: Any = None
) -> tuple[Contender, Any]:
    """Build a contender that trains as train/main.py does; return it and its process groups, which later ones share.

    Args:
        manifest: of the dataset to read; None for random tokens.
        groups: of an earlier contender with the same layout.
    """
    from train.parts import build_engine

    engine = build_engine(config, vocab_size, groups)
    batches = open_batches(config, vocab_size, engine.groups.grid, from_dataset=manifest is not None)
    return Contender(name, config, vocab_size, engine_step(engine, batches)), engine.groups


def peer_contender(name: str, config: Config, vocab_size: int, manifest: Manifest | None, form: str) -> Contender:
    """Build a GPT-2 of the configuration's sizes in plain PyTorch.

    Args:
        config: of architecture SM+LN+G; of its layout nothing is used.
        manifest: of the dataset to read; None for random tokens.
        form: one of train.benchmark.peer.FORMS.
    """
    from parallel.config import padded_vocab_size
    from parallel.launch import initialize_distributed, local_device, rank, world_size
    from train.benchmark.peer import Peer
    from train.start.timeline import phase

    with phase("join"):
        initialize_distributed()
    grid = RankGrid(tp=world_size(), rank=rank()) if form == "TP" else RankGrid(dp=world_size(), rank=rank())
    micro_batches = config.training.global_batch_size // (config.training.micro_batch_size * grid.dp)
    with phase("weights"):
        peer = Peer(config, padded_vocab_size(vocab_size, grid.tp), local_device(), form, micro_batches)
    batches = open_batches(config, vocab_size, grid, from_dataset=manifest is not None)
    return Contender(name, config, vocab_size, peer_step(peer, batches))


def engine_step(engine: Any, batches: Iterator["MicroBatch"]) -> Callable[[], Report]:
    """Return a call that trains one step with our engine at a learning rate of 0."""
    return lambda: engine.train_step(batches, learning_rate=0.0)[0]  # type: ignore[no-any-return]


def peer_step(peer: Any, batches: Iterator["MicroBatch"]) -> Callable[[], Report]:
    """Return a call that trains one step of the plain PyTorch peer."""
    return lambda: peer.train_step(batches)  # type: ignore[no-any-return]


def dataset(config: Config, say: Callable[[str], Any] = print) -> Manifest | None:
    """Open the dataset. Say so and return None if it cannot be read."""
    try:
        return open_dataset_once(config.data.path, config.data.read_options())
    except DataError as error:
        say(f"random tokens: no dataset at data.path = {config.data.path} ({error})")
        return None


def vocabulary_of(config: Config, manifest: Manifest | None) -> int:
    """Return the dataset's vocabulary size, or that of random tokens."""
    return manifest.vocab_size if manifest is not None else config.data.planned_vocab_size or DEFAULT_VOCABULARY


def open_batches(config: Config, vocab_size: int, grid: RankGrid, from_dataset: bool) -> Iterator["MicroBatch"]:
    """Yield this rank's micro-batches on the device without end, from the dataset or of random tokens.

    Random steps hold the same sequences under every layout with the same global batch.
    """
    from parallel.launch import local_device
    from parallel.micro_batch import micro_batch, to_device
    from train.parts import micro_batches, open_stream

    if from_dataset:
        yield from micro_batches(open_stream(config, grid, "train"), grid, local_device())
    training, tokens = config.training, config.model.seq_length
    own = training.global_batch_size // grid.dp
    generator = torch.Generator().manual_seed(training.seed)
    while True:
        rows_BT = torch.randint(vocab_size, (training.global_batch_size, tokens + 1), generator=generator)
        for part_BT in rows_BT[grid.dp_rank * own : (grid.dp_rank + 1) * own].split(training.micro_batch_size):
            yield micro_batch(to_device(part_BT.contiguous(), local_device()), grid.positions(tokens))
