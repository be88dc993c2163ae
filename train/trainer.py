"""The training loop."""

from pathlib import Path
from typing import Any

from data.manifest import Manifest
from parallel.launch import local_device, rank
from parallel.replicas import check_replicas
from parallel.telemetry import HeadSnapshot, head_snapshot
from train import checkpoint
from train.checkpoint import Progress
from train.config import Config
from train.metrics import StepMetrics
from train.progress import ProgressDisplay
from train.run_dir import JsonLines, RunDirectory
from train.schedule import learning_rate
from train.setup import build_engine, dataset_identity, micro_batches, open_stream
from train.tensorboard import TensorBoardLog
from train.validation import Validation, validate


class TrainingError(RuntimeError):
    """Training cannot go on; one clear line."""


class Trainer:
    """A run from its first or its resumed step to its last.

    Args:
        config: resolved.
        manifest: of the dataset at `config.data.path`.
        run: the open run directory on rank 0, None on other ranks.
    """

    def __init__(self, config: Config, manifest: Manifest, run: RunDirectory | None) -> None:
        self.config, self.manifest = config, manifest
        self.folder = Path(config.run_dir)
        found = checkpoint.complete_checkpoints(self.folder / "checkpoints")
        marker = checkpoint.read_marker(found[-1]) if found else None
        if marker is not None:
            checkpoint.check_fits(found[-1], marker, config, dataset_identity(manifest))
        self.engine = build_engine(config, manifest.vocab_size)
        self.grid = self.engine.groups.grid
        self.stream = open_stream(config, self.grid, "train")
        self.batches = micro_batches(self.stream, self.grid, local_device())
        self.step = 0
        if marker is not None:
            checkpoint.load(found[-1], marker, self.engine, manifest.vocab_size)
            self.stream.load_state_dict(marker["data_state"])
            self.step = marker["step"]
        self.metrics = StepMetrics(self.engine.groups, config.tokens_per_step)
        self.log = RunLog(self.folder, config, self.step) if run is not None else None

    def train(self) -> Validation | None:
        """Trains to the last step; returns the validation over the whole split, or None if the run was complete
        before.
        """
        if self.step >= self.config.train_steps:
            return None
        self.metrics.start()
        while self.step < self.config.train_steps:
            rate = learning_rate(self.config.optimizer, self.step, self.config.train_steps)
            statistics = self.engine.train_step(self.batches, rate)
            self.step += 1
            self.metrics.record(self.step, rate, statistics, self.engine.gradient_norm)
            if self._due(self.config.logging.interval):
                self._log(head_snapshot(self.engine.stage, statistics, self.engine.groups))
            if every(self.config.parallel.replica_check_interval, self.step):
                check_replicas(self.engine.stage, self.engine.groups)
            if self._due(self.config.training.evaluation_interval) and self.step < self.config.train_steps:
                self._evaluate(self.config.training.evaluation_samples)
            if self._due(self.config.checkpoint.interval):
                self._save()
        return self._evaluate(None)

    def close(self) -> None:
        self.stream.close()
        if self.log is not None:
            self.log.close()

    def _due(self, interval: int) -> bool:
        """Whether a thing done every `interval` steps (0: at the end only) is due now; everything is due at the end."""
        return self.step == self.config.train_steps or every(interval, self.step)

    def _log(self, heads: HeadSnapshot) -> None:
        rows = self.metrics.flush()
        if self.log is not None:
            self.log.steps(rows, heads)
        lost = next((row for row in rows if row["loss"] != row["loss"] or abs(row["loss"]) == float("inf")), None)
        if lost is not None:
            raise TrainingError(
                f"step {lost['step']}: the loss is {lost['loss']}; entropies up to here are in "
                f"{self.folder}/entropy.jsonl, the last "
                "checkpoint is intact; lower optimizer.learning_rate or choose a more stable architecture"
            )
        self.metrics.start()

    def _evaluate(self, limit_samples: int | None) -> Validation:
        validation = validate(self.engine.stage, self.engine.groups, self.config, limit_samples, self.engine.evaluate)
        if self.log is not None:
            self.log.evaluation(self.step, self.step * self.config.tokens_per_step, validation)
        self.metrics.start()
        return validation

    def _save(self) -> None:
        progress = Progress(self.step, self.stream.state_dict())
        checkpoint.save(
            self.folder / "checkpoints", self.engine, self.config, dataset_identity(self.manifest), progress
        )
        self.metrics.start()


def every(interval: int, step: int) -> bool:
    """Whether a thing done every `interval` steps (0: never) is due."""
    return interval > 0 and step % interval == 0


class RunLog:
    """Everything rank 0 writes while training: JSON lines, TensorBoard, the terminal."""

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self.config = config
        self.metrics = JsonLines(folder / "metrics.jsonl", first_step)
        self.heads = JsonLines(folder / "entropy.jsonl", first_step)
        self.board = TensorBoardLog(folder / "tensorboard", config, first_step) if config.logging.tensorboard else None
        self.display = ProgressDisplay(config.train_steps, first_step)
        if first_step:
            self.display.say(f"resumed {folder} at step {first_step}")

    def steps(self, rows: list[dict[str, Any]], heads: HeadSnapshot) -> None:
        """Rows since the last logging step, and the heads at the last of them."""
        for row in rows:
            self.metrics.write(row)
            if self.board is not None:
                self.board.step(row)
        head_row = {"step": rows[-1]["step"], "tokens": rows[-1]["tokens"], **heads.as_row()}
        self.heads.write(head_row)
        self.display.show_step(rows[-1])
        if self.board is not None:
            self.board.heads(head_row)
            interval = self.config.logging.image_interval
            if interval and (head_row["step"] % interval == 0 or head_row["step"] == self.config.train_steps):
                self.board.images(head_row, self.config.model.seq_length)

    def evaluation(self, step: int, tokens: int, validation: Validation) -> None:
        row = {
            "step": step,
            "tokens": tokens,
            "validation_loss": validation.loss,
            "validation_perplexity": validation.perplexity,
            "validation_tokens": validation.tokens,
        }
        self.metrics.write(row)
        self.display.say(f"step {step}  validation loss {validation.loss:.4f}  perplexity {validation.perplexity:.2f}")
        if self.board is not None:
            self.board.evaluation(row)

    def close(self) -> None:
        self.metrics.close()
        self.heads.close()
        self.display.close()
        if self.board is not None:
            self.board.close()


def run(config: Config, manifest: Manifest) -> Validation | None:
    """One run on this process's rank; resources are released in any case."""
    directory = RunDirectory(config.run_dir, config) if rank() == 0 else None
    trainer = Trainer(config, manifest, directory)
    try:
        return trainer.train()
    finally:
        trainer.close()
        if directory is not None:
            directory.close()
