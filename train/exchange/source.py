"""Open a checkpoint of a run to read single tensors of it, whatever layout saved it."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.errors import DataError
from data.shards.tokenizer import Tokenizer
from data.stream.dataset import open_dataset
from train.checkpoint.load import SavedCheckpoint
from train.checkpoint.whole import find_checkpoint, run_config
from train.config import Config
from train.config.schedule import norm_gate
from train.exchange.plain import PlainWeights
from train.run.reader import RunError


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a run, open for reading.

    Attributes:
        run: its folder.
        config: of the run, resolved.
        saved: the checkpoint.
        vocab_size: tokens of its tokenizer.
        weights: its plain parameters, each read when it is asked for.
    """

    run: Path
    config: Config
    saved: SavedCheckpoint
    vocab_size: int
    weights: PlainWeights

    def tokenizer(self, file: Path | None = None) -> Tokenizer:
        """Return the tokenizer that the run was trained with.

        Args:
            file: where it is; None takes it from the run's dataset.

        Raises:
            DataError: it cannot be read.
            RunError: it is another one.
        """
        tokenizer = Tokenizer(file or self._dataset_tokenizer())
        expected = self.saved.marker["dataset"]["tokenizer_sha256"]
        if tokenizer.sha256 != expected:
            raise RunError(
                f"{tokenizer.source}: has sha256 {tokenizer.sha256}, but the run was trained with {expected}; name "
                "that tokenizer.model with --tokenizer"
            )
        return tokenizer

    def _dataset_tokenizer(self) -> Path:
        data = self.config.data
        try:
            return open_dataset(data.path, data.read_options()).tokenizer_path
        except DataError as error:
            raise RunError(f"{error}. If the dataset is gone, name its tokenizer.model with --tokenizer") from None


def open_trained(run: Path, step: int | None = None, allow_commands: bool = False) -> TrainedModel:
    """Open the newest sound checkpoint of a run, or that of a step.

    Raises:
        RunError, ConfigError, CheckpointError: there is none, or it cannot be read or exported.
    """
    config = run_config(run, None, allow_commands)
    saved = find_checkpoint(config, None, step)
    if config.model.norm == "taper" and norm_gate(config, saved.step) > 0:
        fixed = math.ceil(config.optimizer.taper_end * config.train_steps)
        raise RunError(
            f"{run}: the norms of step {saved.step} are no fixed maps yet; export a checkpoint of step {fixed} or "
            "later (optimizer.taper_end)"
        )

    def read(name: str) -> Tensor:
        return saved.read_whole(name if name.startswith("buffer.") else f"model.{name}")

    weights = PlainWeights(config.model, read, saved.names)
    return TrainedModel(run, config, saved, int(saved.marker["dataset"]["vocab_size"]), weights)
