"""Open a checkpoint of a run to read single tensors of it, whatever layout saved it."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.command_line import print_warning
from data.errors import DataError
from data.shards.tokenizer import Tokenizer
from data.stream.dataset import open_dataset
from parallel.launch import initialize_distributed
from train.checkpoint import load as checkpoint
from train.checkpoint.folder import Folder
from train.checkpoint.load import SavedCheckpoint
from train.checkpoint.root import CheckpointError
from train.config import Config, config_from_dict
from train.exchange.plain import PlainWeights
from train.run.directory import recorded_run_id
from train.run.names import CONFIG
from train.run.reader import RunError, RunReader
from train.run.same_run import Use


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
        RunError, ConfigError, CheckpointError, LaunchError: there is none, or it cannot be read.
    """
    tree = RunReader(run).config()
    if tree is None:
        raise RunError(f"{run}: holds no run (no {CONFIG})")
    tree.pop("health", None)  # not used here; earlier versions took values that are refused now
    tree["run_dir"] = str(run)  # it may have been moved
    config = config_from_dict(tree, allow_commands)
    root = Folder(config.checkpoint_folder)
    steps = checkpoint.steps_saved(root)
    if not steps:
        raise RunError(f"{run}: has no complete checkpoint yet; wait for one (checkpoint.interval)")
    if step is not None and step not in steps:
        shown = ", ".join(map(str, steps[-10:]))
        raise RunError(f"{run}: has no complete checkpoint of step {step}; choose --step from {shown}")
    initialize_distributed()
    group = checkpoint.checkpoint_group(config.health.save_limit_s)
    saved, faults = checkpoint.newest_sound(root, group, recorded_run_id(run), None if step is None else step + 1)
    if saved is None or (step is not None and saved.step != step):
        raise CheckpointError(f"{faults[0]}; choose another --step, or restore the checkpoint from a copy")
    for fault in faults:
        print_warning(f"{fault}; the one before is used")
    checkpoint.check_fits(saved, config, saved.marker["dataset"], Use.WEIGHTS)

    def read(name: str) -> Tensor:
        return saved.read_whole(name if name.startswith("buffer.") else f"model.{name}")

    weights = PlainWeights(config.model, read, saved.names)
    return TrainedModel(run, config, saved, int(saved.marker["dataset"]["vocab_size"]), weights)
