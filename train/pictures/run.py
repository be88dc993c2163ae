"""Load a run as the pictures need it.

Its rows are read strictly: a picture must not silently lack a part of the run. So the first line that is damaged, or
has the wrong shape, is an error that names the file, the line and the remedy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from model.config import LARGEST_SIZES
from train.run.names import CONFIG, ENTROPY, EVALUATION, METRICS
from train.run.reader import Row, RunError, RunReader, read_lines

Array = NDArray[np.float64]
LARGEST_NUMBER = 3.5e38  # runs compute in float32
HEAD_FIELDS = ("entropy_nats", "threshold", "temperature")
"""Fields of a row of entropies that hold [layers][heads]."""
LAYER_FIELDS = ("temperature_min", "temperature_max", "alpha", "beta")
"""Fields that hold [layers]."""


class FigureError(ValueError):
    """A run cannot be drawn; the message is one line."""


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    Attributes:
        folder: the run_dir.
        model: the model section of its configuration.
        data_path: where its dataset was.
        vocab_size: number of tokens, or 'None' if an earlier version did not record it.
        fingerprint: of its dataset; None if nothing tells.
        training_rows: one a step.
        validation_rows: one an evaluation.
        head_rows: one a logging step, with the arrays of HEAD_FIELDS and LAYER_FIELDS; null where the model has none.
        evaluation: what train.evaluate found; None if it has not been run.
    """

    folder: Path
    model: dict[str, Any]
    data_path: str
    vocab_size: str
    fingerprint: str | None
    training_rows: list[Row]
    validation_rows: list[Row]
    head_rows: list[Row]
    evaluation: Row | None

    @property
    def title(self) -> str:
        return f"{self.folder.resolve().name}: {self.model['architecture']}"

    @property
    def seq_length(self) -> int:
        return int(self.model["seq_length"])

    def newest_heads(self) -> tuple[Array, str] | None:
        """Return the newest entropies and where they come from.

        Returns:
            [L, N] in nats from the evaluation, or from the log if training has gone on since; None if there are none.
        """
        logged = self.head_rows[-1] if self.head_rows else None
        if self.evaluation is not None and (logged is None or self.evaluation["step"] >= logged["step"]):
            return as_array(self.evaluation["entropy_nats"]), f"validation, step {self.evaluation['step']:,}"
        if logged is not None:
            return as_array(logged["entropy_nats"]), f"step {logged['step']:,}"
        return None

    def head_history(self) -> tuple[Array, Array]:
        """Return the logging steps [S] and the entropies [S, L, N] in nats."""
        rows = self.head_rows
        return as_array([row["step"] for row in rows]), as_array([row["entropy_nats"] for row in rows])

    def validation_curve(self, axis: str) -> tuple[Array, Array] | None:
        """Return the evaluations as (step or tokens, loss in nats a token); None if there was none.

        Args:
            axis: 'step' or 'tokens'.
        """
        rows = self.validation_rows
        if not rows:
            return None
        return as_array([row[axis] for row in rows]), as_array([row["validation_loss"] for row in rows])


def load_run(folder: Path) -> Run:
    """Load a run from its folder.

    Raises:
        FigureError: a file is missing or damaged; names the file, the line and the remedy.
    """
    if not folder.is_dir():
        raise FigureError(f"{folder}: no such run directory; name the run_dir of a training run")
    reader = RunReader(folder)
    try:
        config, evaluation = _existing(folder / CONFIG, reader.description()), reader.evaluation()
    except RunError as error:
        raise FigureError(str(error)) from None
    try:
        model = dict(config["config"]["model"])
        sizes = {key: model[key] for key in ("num_layers", "num_attention_heads", "seq_length")}
        if not all(type(size) is int and 1 <= size <= LARGEST_SIZES[key] for key, size in sizes.items()):
            raise ValueError(f"its sizes are {sizes}")
        str(model["architecture"])
        data_path = str(config["config"].get("data", {}).get("path", "unknown data"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FigureError(f"{folder / CONFIG}: lacks a usable model section ({error!r}); restore the file") from None
    shape = (sizes["num_layers"], sizes["num_attention_heads"])
    rows = _strict_rows(folder / METRICS, ("step", "tokens"))
    heads = _strict_rows(folder / ENTROPY, ("step", "entropy_nats"))
    for row in heads:
        _check_head_row(folder / ENTROPY, row, shape)
        _check_complete(folder / ENTROPY, row, heads[-1])
    if evaluation is not None:
        _check_head_row(folder / EVALUATION, evaluation, shape)
    return Run(
        folder=folder,
        model=model,
        data_path=data_path,
        vocab_size=str(config.get("vocab_size")),
        fingerprint=reader.fingerprint(),
        training_rows=[row for row in rows if "ce_loss" in row and "entropy_loss" in row],
        validation_rows=[row for row in rows if "validation_loss" in row],
        head_rows=heads,
        evaluation=evaluation,
    )


def as_array(values: Any) -> Array:
    """Convert numbers to float64; null, which stands for what is not finite, becomes NaN.

    Raises:
        FigureError: something is no number.
    """
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise FigureError(f"a row holds something other than numbers ({error}); remove that row") from None


def _existing(file: Path, content: Row | None) -> Row:
    if content is None:
        raise FigureError(f"{file}: missing; --run must name a run directory in which training has begun")
    return content


def _strict_rows(file: Path, keys: tuple[str, ...]) -> list[Row]:
    """Return the rows of a file; a last line that is cut short, still being written, is left out."""
    if not file.exists():
        _existing(file, None)
    rows = []
    try:
        for line in read_lines(file):
            if _is_sound(line.row, keys):
                rows.append(line.row)
            elif line.is_whole:
                found = line.content[:40].decode(errors="backslashreplace")
                raise FigureError(
                    f"{file}: line {line.number}: expected a JSON object, in UTF-8, with {' and '.join(keys)} and "
                    f"numbers in it, found {found!r}; remove that line"
                )
    except OSError as error:
        raise FigureError(f"{file}: cannot be read ({error.strerror})") from None
    return rows


def _is_sound(row: Row | None, keys: tuple[str, ...]) -> TypeGuard[Row]:
    return row is not None and all(row.get(key) is not None for key in keys) and _holds_numbers(row)


def _holds_numbers(row: Row) -> bool:
    """Whether counts are numbers, and losses numbers or null, which stands for what is not finite."""
    counts = [row[key] for key in ("step", "tokens") if key in row]
    losses = [row[key] for key in ("ce_loss", "entropy_loss", "validation_loss") if row.get(key) is not None]
    numbers = all(type(value) in (int, float) for value in counts + losses)
    return (
        numbers
        and all(0 <= count <= LARGEST_NUMBER for count in counts)
        and all(abs(loss) <= LARGEST_NUMBER for loss in losses)
    )


def _check_head_row(file: Path, row: Row, shape: tuple[int, int]) -> None:
    """Raise FigureError unless every array of a row has the model's layers and heads."""
    if "step" not in row or row.get("entropy_nats") is None or not _holds_numbers(row):
        raise FigureError(f"{file}: lacks step or entropy_nats as numbers; run the command that writes it again")
    expected = {**dict.fromkeys(HEAD_FIELDS, shape), **dict.fromkeys(LAYER_FIELDS, shape[:1])}
    for key, wanted in expected.items():
        if row.get(key) is None:
            continue
        try:
            array = as_array(row[key])
            found: Any = "too large a number" if (np.abs(array) > LARGEST_NUMBER).any() else array.shape
        except FigureError:
            found = "no array of numbers"
        if found != wanted:
            raise FigureError(
                f"{file}: step {row['step']}: {key} is {found}, but the model has [layers, heads] = {list(shape)}; "
                "the row is damaged or belongs to another run"
            )


def _check_complete(file: Path, row: Row, last: Row) -> None:
    """Raise FigureError if a row lacks what is drawn of the last one."""
    drawn = [key for key in (*HEAD_FIELDS, *LAYER_FIELDS) if last.get(key) is not None]
    if "temperature" in drawn:
        drawn += ["temperature_min", "temperature_max"]
    missing = [key for key in drawn if row.get(key) is None]
    if missing:
        raise FigureError(f"{file}: step {row['step']}: lacks {missing[0]}; the row is damaged, remove it")
