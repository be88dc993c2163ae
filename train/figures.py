"""Draws every picture that a run supports, or compares several runs:

    python -m train.figures --run runs/first
    python -m train.figures --run runs/ereg runs/baseline --output comparison

One run gives the head map, layer entropies, head shares, thresholds, learned scales and losses, in its figures/ folder.
Two or more give their validation losses in one picture and their head maps side by side. A run that is still writing
may be drawn at any time.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.errors import run_command
from model.config import LARGEST_SIZES
from train.run.folder import read_fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Row = dict[str, Any]
LARGEST_NUMBER = 3.5e38  # runs compute in float32


class FigureError(ValueError):
    """A run cannot be drawn; one clear line."""


@dataclass(frozen=True)
class Run:
    """What the files of one run directory say."""

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
        """Entropies [L, N] in nats and where they come from: the evaluation unless training has gone on since."""
        logged = self.head_rows[-1] if self.head_rows else None
        if self.evaluation is not None and (logged is None or self.evaluation["step"] >= logged["step"]):
            return as_array(self.evaluation["entropy_nats"]), f"validation, step {self.evaluation['step']:,}"
        if logged is not None:
            return as_array(logged["entropy_nats"]), f"step {logged['step']:,}"
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.figures", description="Draws the pictures of a run, or compares runs."
    )
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        action="extend",
        type=Path,
        metavar="DIR",
        help="run directory; several are compared",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: figures/ of the first run)"
    )
    parser.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="file type (default: png)")
    options = parser.parse_args(arguments)
    try:
        runs = [load_run(folder) for folder in options.run]
        output = options.output or options.run[0] / "figures"
        for file in save(figures_of(runs), output, options.format):
            print(file)
    except FigureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def figures_of(runs: list[Run]) -> Iterator[tuple[str, "Figure"]]:
    """File stem and figure of each picture that the rows suffice for."""
    return run_figures(runs[0]) if len(runs) == 1 else comparison_figures(runs)


def run_figures(run: Run) -> Iterator[tuple[str, "Figure"]]:
    """Every picture of one run."""
    from train.pictures import maps as map_plots
    from train.pictures import plots

    newest = run.newest_heads()
    if newest is not None:
        entropy_nats, moment = newest
        yield "head_map", map_plots.head_map_figure(entropy_nats, run.seq_length, f"{run.title}\n{moment}")
    if run.training_rows:
        train = {key: as_array([row[key] for row in run.training_rows]) for key in ("step", "ce_loss", "entropy_loss")}
        yield "loss", plots.loss_figure(train, validation_curve(run, "step"), run.title)
    if not run.head_rows:
        return
    steps = as_array([row["step"] for row in run.head_rows])
    entropy_SLN = as_array([row["entropy_nats"] for row in run.head_rows])
    yield "layer_entropy", plots.layer_entropy_figure(steps, entropy_SLN, run.seq_length, run.title)
    yield "head_shares", plots.bins_figure(steps, entropy_SLN, run.title)
    last = run.head_rows[-1]
    if last.get("threshold") is not None:
        title = f"{run.title}, step {last['step']:,}"
        yield "threshold_map", map_plots.threshold_map_figure(as_array(last["threshold"]), title)
    panels, ranges = learned_scales(run.head_rows)
    if panels:
        yield "learned_scales", plots.scales_figure(steps, panels, ranges, run.title)


def comparison_figures(runs: list[Run]) -> Iterator[tuple[str, "Figure"]]:
    """The pictures that hold several runs."""
    from train.pictures import maps as map_plots
    from train.pictures import plots

    names = distinct_names(runs)
    noted = {run.fingerprint for run in runs}
    if len({(run.data_path, run.vocab_size) for run in runs} if None in noted else noted) > 1:
        told = "; ".join(f"{run.folder}: {run.data_path}, vocabulary {run.vocab_size}" for run in runs)
        print(f"warning: losses a token do not compare, since the runs' datasets differ ({told})", file=sys.stderr)
        names = [f"{name} on {Path(run.data_path).name}" for name, run in zip(names, runs, strict=True)]
    curves = {name: validation_curve(run, "tokens") for name, run in zip(names, runs, strict=True)}
    found = {name: curve for name, curve in curves.items() if curve is not None}
    if found:
        yield "validation_loss", plots.validation_figure(found)
    maps = {}
    seq_lengths = []
    for name, run in zip(names, runs, strict=True):
        newest = run.newest_heads()
        if newest is not None:
            maps[f"{name}\n{newest[1]}"] = newest[0]
            seq_lengths.append(run.seq_length)
    if maps:
        yield "head_maps", map_plots.head_maps_figure(maps, seq_lengths)


def learned_scales(rows: list[Row]) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
    """Panels [S, L] of the learned scalars a run has, and the range that the temperature's layer means hide."""
    panels: dict[str, Array] = {}
    ranges: dict[str, tuple[Array, Array]] = {}
    if rows[-1].get("temperature") is not None:
        label = "temperature t (mean a layer;\ngrey: range over all heads and positions)"
        panels[label] = as_array([row["temperature"] for row in rows]).mean(axis=2)
        least, greatest = (as_array([row[f"temperature_{end}"] for row in rows]) for end in ("min", "max"))
        ranges[label] = least.min(axis=1), greatest.max(axis=1)
    for key, label in (
        ("alpha", r"$\alpha$: the FFN is divided by it"),
        ("beta", r"$\beta$: the residual is multiplied by it"),
    ):
        if rows[-1].get(key) is not None:
            panels[label] = as_array([row[key] for row in rows])
    return panels, ranges


def validation_curve(run: Run, axis: str) -> tuple[Array, Array] | None:
    """The evaluations as (steps or tokens, losses in nats a token), or None where there was none."""
    rows = run.validation_rows
    if not rows:
        return None
    return as_array([row[axis] for row in rows]), as_array([row["validation_loss"] for row in rows])


def distinct_names(runs: list[Run]) -> list[str]:
    """A short name for each run, the whole path where folders are named alike."""
    titles = [run.title for run in runs]
    return [
        title if titles.count(title) == 1 else f"{run.folder}: {run.model['architecture']}"
        for title, run in zip(titles, runs, strict=True)
    ]


def save(figures: Iterator[tuple[str, "Figure"]], output: Path, file_format: str) -> Iterator[Path]:
    """Writes each figure and yields its file; raises FigureError where nothing can be drawn or written."""
    nothing = True
    for stem, figure in figures:
        file = output / f"{stem}.{file_format}"
        try:
            output.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=150)
        except OSError as error:
            raise FigureError(f"{file}: cannot be written ({error.strerror}); choose another --output") from None
        nothing = False
        yield file
    if nothing:
        raise FigureError("nothing to draw: no run has reached its first logging step or evaluation; wait for one")


def load_run(folder: Path) -> Run:
    """Reads a run directory.

    Raises:
        FigureError: a file is missing or damaged; names the file, the line and the remedy.
    """
    if not folder.is_dir():
        raise FigureError(f"{folder}: no such run directory; name the run_dir of a training run")
    config = read_object(folder / "config.json")
    try:
        model = dict(config["config"]["model"])
        sizes = {key: model[key] for key in ("num_layers", "num_attention_heads", "seq_length")}
        if not all(type(size) is int and 1 <= size <= LARGEST_SIZES[key] for key, size in sizes.items()):
            raise ValueError(f"its sizes are {sizes}")
        str(model["architecture"])
        data_path = str(config["config"].get("data", {}).get("path", "unknown data"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FigureError(f"{folder}/config.json: lacks a usable model section ({error!r}); restore the file") from None
    shape = (sizes["num_layers"], sizes["num_attention_heads"])
    rows = read_rows(folder / "metrics.jsonl", ("step", "tokens"))
    training = [row for row in rows if "ce_loss" in row and "entropy_loss" in row]
    heads = read_rows(folder / "entropy.jsonl", ("step", "entropy_nats"))
    for row in heads:
        check_head_row(folder / "entropy.jsonl", row, shape)
        check_as_complete(folder / "entropy.jsonl", row, heads[-1])
    evaluation = None
    if (folder / "evaluation.json").exists():
        evaluation = read_object(folder / "evaluation.json")
        check_head_row(folder / "evaluation.json", evaluation, shape)
    validations = [row for row in rows if "validation_loss" in row]
    vocab_size, fingerprint = str(config.get("vocab_size")), read_fingerprint(folder)
    return Run(folder, model, data_path, vocab_size, fingerprint, training, validations, heads, evaluation)


def read_object(file: Path) -> Row:
    """One JSON object from a file; raises FigureError."""
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise FigureError(
            f"{file}: damaged, not JSON ({error}); restore it or run the command that writes it again"
        ) from None
    if not isinstance(value, dict):
        raise FigureError(f"{file}: expected a JSON object, found {type(value).__name__}; restore the file")
    return value


def read_rows(file: Path, keys: tuple[str, ...]) -> list[Row]:
    """The rows of a file of one JSON object a line; a last line cut short, still being written, is left out.

    Raises:
        FigureError: the file is missing, or a finished line is not an object with all of `keys`, or holds something
            other than numbers.
    """
    *finished, last = read_text(file).split("\n")
    rows = []
    for number, line in enumerate(finished, start=1):
        row = row_of(line, keys)
        if row is None:
            raise FigureError(
                f"{file}: line {number}: expected a JSON object with {' and '.join(keys)} and numbers in it, found "
                f"{line[:40]!r}; remove that line"
            )
        rows.append(row)
    row = row_of(last, keys)
    return rows if row is None else [*rows, row]


def row_of(line: str, keys: tuple[str, ...]) -> Row | None:
    """The object a line holds, or None where it holds none, lacks a key or has something other than numbers."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(row, dict) and all(row.get(key) is not None for key in keys) and holds_numbers(row)
    return row if sound else None


def holds_numbers(row: Row) -> bool:
    """Whether what stands for one number is one: counts, which every row has, and losses, null where not finite."""
    counts = [row[key] for key in ("step", "tokens") if key in row]
    losses = [row[key] for key in ("ce_loss", "entropy_loss", "validation_loss") if row.get(key) is not None]
    numbers = all(type(value) in (int, float) for value in counts + losses)
    return (
        numbers
        and all(0 <= count <= LARGEST_NUMBER for count in counts)
        and all(abs(loss) <= LARGEST_NUMBER for loss in losses)
    )


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FigureError(f"{file}: missing; --run must name a run directory in which training has begun") from None
    except UnicodeDecodeError as error:
        raise FigureError(f"{file}: damaged, byte {error.start} is not UTF-8; restore the file") from None
    except OSError as error:
        raise FigureError(f"{file}: cannot be read ({error.strerror})") from None


HEAD_FIELDS, LAYER_FIELDS = (
    ("entropy_nats", "threshold", "temperature"),
    ("temperature_min", "temperature_max", "alpha", "beta"),
)


def check_head_row(file: Path, row: Row, shape: tuple[int, int]) -> None:
    """Raises FigureError unless every array of a row has the model's layers and heads."""
    if "step" not in row or row.get("entropy_nats") is None or not holds_numbers(row):
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


def check_as_complete(file: Path, row: Row, last: Row) -> None:
    """Raises FigureError where a row lacks what is drawn of the last one."""
    drawn = [key for key in (*HEAD_FIELDS, *LAYER_FIELDS) if last.get(key) is not None]
    if "temperature" in drawn:
        drawn += ["temperature_min", "temperature_max"]
    missing = [key for key in drawn if row.get(key) is None]
    if missing:
        raise FigureError(f"{file}: step {row['step']}: lacks {missing[0]}; the row is damaged, remove it")


def as_array(values: Any) -> Array:
    """Numbers as float64; null, which stands for what is not finite, as NaN. Raises FigureError for anything else."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise FigureError(f"a row holds something other than numbers ({error}); remove that row") from None


if __name__ == "__main__":
    run_command(main)
