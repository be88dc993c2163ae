"""Writes a run to TensorBoard: scalars in groups, head and threshold maps, histograms, hyperparameters."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np

from parallel.engine.telemetry import METRICS
from train.config import Config

STEP_SCALARS = {
    "loss": ("loss", *METRICS),
    "optimizer": ("learning_rate", "grad_norm"),
    "speed": ("step_time_s", "tokens_per_second", "data_wait_s", "mfu", "goodput"),
}
LAYER_MEANS = {"entropy_nats": "layer_entropy_nats", "threshold": "threshold", "temperature": "temperature"}
LAYER_VALUES = ("alpha", "beta")
HYPERPARAMETER_SECTIONS = ("model", "regularizer", "optimizer", "training")
RESULTS = ("validation/validation_loss", "validation/validation_perplexity")


class TensorBoardLog:
    """Writes rows of metrics.jsonl and entropy.jsonl; a resumed run continues its curves without duplicate steps."""

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self._folder = folder
        self._writer: Any
        self._files: set[Path]
        self._open(first_step)
        if first_step == 0:
            self._hyperparameters(config)
            self._writer.add_custom_scalars(chart_layout())

    def step(self, row: dict[str, Any]) -> None:
        self._last_step = row["step"]
        for group, keys in STEP_SCALARS.items():
            for key in (key for key in keys if row.get(key) is not None):
                self._writer.add_scalar(f"{group}/{key}", row[key], row["step"])

    def evaluation(self, row: dict[str, Any]) -> None:
        for tag in RESULTS:
            self._writer.add_scalar(tag, row[tag.partition("/")[2]], row["step"])

    def tasks(self, step: int, accuracies: dict[str, float]) -> None:
        """Write accuracies by 'downstream_NAME'."""
        for name, value in accuracies.items():
            self._writer.add_scalar(name.replace("_", "/", 1), value, step)

    def heads(self, row: dict[str, Any]) -> None:
        """Write each layer's mean over heads (entropy in nats, threshold, temperature) and its alpha and beta."""
        for key, group in LAYER_MEANS.items():
            for layer, values in enumerate(row[key] or []):
                self._writer.add_scalar(f"{group}/layer_{layer:02d}", sum(values) / len(values), row["step"])
        for key in LAYER_VALUES:
            for layer, value in enumerate(row[key] or []):
                self._writer.add_scalar(f"{key}/layer_{layer:02d}", value, row["step"])

    def images(self, row: dict[str, Any], seq_length: int) -> None:
        """Draw the head map and the threshold map, and histograms of all heads' entropies, thresholds, temperatures.

        A head's temperature is its mean over positions; entropy.jsonl has the extremes. Images and histograms have tags
        of their own, because TensorBoard shows only one of two kinds under the same tag.
        """
        from train.pictures.maps import head_map_figure, threshold_map_figure

        step, title = row["step"], f"step {row['step']}"
        self._writer.add_figure("head_maps/entropy_nats", head_map_figure(row["entropy_nats"], seq_length, title), step)
        if row["threshold"] is not None:
            self._writer.add_figure("head_maps/threshold", threshold_map_figure(row["threshold"], title), step)
        for key in LAYER_MEANS:
            values = np.array(row[key] if row[key] is not None else [], dtype=float)
            values = values[np.isfinite(values)]
            if values.size:
                self._writer.add_histogram(f"heads/{key}", values, step)

    def reopen_if_removed(self) -> None:
        """Begin a new event file if somebody removed the one that is written.

        Raises:
            FileNotFoundError: it was removed.
        """
        if all(file.exists() for file in self._files):
            return
        with contextlib.suppress(OSError):
            self._writer.close()
        self._open(self._last_step)
        raise FileNotFoundError("its event file was removed; a new one goes on from here")

    def flush(self) -> None:
        """Write buffered rows, so that a killed process leaves no gap."""
        self._writer.flush()
        self._files = self._files or set(self._folder.glob("*")) - self._others

    def close(self) -> None:
        self._writer.close()

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._others, self._files = set(self._folder.glob("*")), set()
        self._last_step = first_step
        threading.excepthook = _leave_to_flush
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)

    def _hyperparameters(self, config: Config) -> None:
        """Write them to the run itself; the writer's own add_hparams would open a second run."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(flat_hyperparameters(config), dict.fromkeys(RESULTS, 0.0)):
            self._writer.file_writer.add_summary(summary)


def _leave_to_flush(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, except TensorBoard's on a disk error: `flush` raises that again, for one message."""
    is_writers = type(failure.thread).__module__.startswith("tensorboard.")
    if not (is_writers and isinstance(failure.exc_value, OSError)):
        threading.__excepthook__(failure)


def flat_hyperparameters(config: Config) -> dict[str, Any]:
    """Flatten the sections that define a run to 'section.key' -> value; TensorBoard takes no null and no list."""
    tree = config.record()
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for section in HYPERPARAMETER_SECTIONS
        for key, value in tree[section].items()
    }


def chart_layout() -> dict[str, Any]:
    """Put all layers of a quantity in one chart, on the tab "Custom scalars"."""
    groups = [*LAYER_MEANS.values(), *LAYER_VALUES]
    return {
        "layers": {group: ["Multiline", [f"{group}/layer_.*"]] for group in groups},
        "losses": {"train and validation": ["Multiline", ["loss/ce_loss", "validation/validation_loss"]]},
    }
