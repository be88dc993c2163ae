"""Read the outcome of a stage from its folder, thinned and rounded to what a report shows."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.fetch.sources import ReadOptions
from data.files.strict_json import check_shape, parse_json
from data.shards.manifest import REPORT
from data.stream.dataset import open_dataset, open_dataset_once
from train.config import Config
from train.pictures.run import Array, FigureError, Run, as_array, load_run
from train.run.reader import Row, RunError, RunReader, read_object
from train.study.outcome import Outcome, Tree
from train.study.state import State, is_head_map, lost_layer
from train.study.suite import Stage

ENVIRONMENT = "environment.json"
"""In the suite's folder: the machine it was run on."""
CURVE_POINTS, VALIDATION_POINTS, ENTROPY_POINTS = 60, 60, 20
COMPARED = ("model", "regularizer", "optimizer")
MOST_REPORT_BYTES = 1 << 24
DRAWN = ("step", "tokens", "ce_loss", "grad_norm", "tokens_per_second")


def outcome_in(stage: Stage, state: State, output: Path) -> Outcome:
    """Return what a stage's folder holds; only what the suite plans, if the run there is another or has not begun.

    Args:
        stage: of a suite.
        state: where it stands (`read_state`).
        output: the suite's folder.
    """
    config, reader, begun = stage.config, RunReader(stage.folder), state.word not in ("new", "other")
    described = description(stage.folder) if begun else {}
    commit = described.get("git_commit")
    return Outcome(
        run=stage.folder.relative_to(output).as_posix(),
        word=state.word,
        step=state.step,
        loss=state.loss,
        halves=_halves(reader, config.train_steps) if state.word == "done" else None,
        detail=state.detail,
        lost_layer=lost_layer(head_rows(reader)) if state.word == "diverged" else None,
        config=compared(config),
        fingerprint=reader.fingerprint() if begun else None,
        vocab_size=vocabulary(described, config),
        bytes_per_token=bytes_per_token(config.data.path, config.data.read_options()),
        commit=commit if isinstance(commit, str) else None,
        machine=_machine(output),
        **_shown(stage.folder) if begun else {},
    )


def compared(config: Config) -> Tree:
    """Return the sections by which a result is the suite's or another's."""
    tree, training = config.as_dict(), config.training
    kept = ("seed", "global_batch_size", "micro_batch_size")
    return {
        **{section: tree[section] for section in COMPARED},
        "training": {**{key: getattr(training, key) for key in kept}, "train_steps": config.train_steps},
    }


def description(folder: Path) -> dict[str, Any]:
    """Return a run's config.json; empty if the run has not begun or the file is damaged."""
    try:
        return RunReader(folder).description() or {}
    except RunError:
        return {}


def vocabulary(described: dict[str, Any], config: Config) -> int:
    """Return the vocabulary that the run recorded, else the dataset's, else the planned one; 0 if none is known."""
    size = described.get("vocab_size")  # runs that have not begun, and earlier versions, have none
    if type(size) is int and 0 < size < 2**31:
        return size
    try:
        return int(open_dataset(config.data.path).vocab_size)
    except DataError:
        return config.data.planned_vocab_size or 0


@functools.lru_cache(maxsize=8)
def bytes_per_token(address: str, options: ReadOptions) -> float | None:
    """Return the bytes of text in a token of the validation split, which data.prepare counted.

    Returns:
        None for a mixture, and for a dataset that cannot be read here or that something else prepared.
    """
    try:
        dataset = open_dataset_once(address, options)
        if dataset.datasets != (dataset,):
            return None
        counts = parse_json(dataset.source.read(REPORT, MOST_REPORT_BYTES))
        check_shape(counts, {"validation": {"text_bytes": int, "tokens": int}})
    except (DataError, ValueError):
        return None
    validation = counts["validation"]
    return validation["text_bytes"] / validation["tokens"] if validation["tokens"] > 0 else None


def head_rows(reader: RunReader) -> list[Row]:
    """Return the rows of entropies that are maps of heads; damaged ones are left out."""
    return [row for row in reader.entropies() if is_head_map(row.get("entropy_nats"))]


def _halves(reader: RunReader, target: int) -> list[float] | None:
    rows = [row for row in reader.metrics() if "validation_loss" in row and row["step"] >= target]
    found: Any = rows[-1].get("validation_loss_halves") if rows else None
    try:
        check_shape(found, [float])
    except ValueError:
        return None
    return found if len(found) == 2 else None


def _machine(output: Path) -> Tree:
    try:
        found = read_object(output / ENVIRONMENT, shape={"device": str, "torch": str, "date": str}) or {}
    except RunError:  # if it is damaged, the report goes without
        return {}
    return {key: found[key] for key in ("device", "torch", "date") if key in found}


def _shown(folder: Path) -> dict[str, Tree | None]:
    """Return what is drawn and counted of a run; nothing if a row is damaged."""
    try:
        run = load_run(folder)
        as_array([[row[key] for key in DRAWN] for row in run.training_rows])
        as_array([row["validation_loss"] for row in run.validation_rows])
    except (FigureError, KeyError):
        return {}
    return {**_training(run), "validation": _validation(run), **_heads(run)}


def _training(run: Run) -> dict[str, Tree | None]:
    if not run.training_rows:
        return {}
    columns = {key: as_array([row[key] for row in run.training_rows]) for key in DRAWN}
    steps, losses, norms = columns["step"], columns["ce_loss"], columns["grad_norm"]
    rise, place = largest_rise(losses)
    finite, ends = losses[np.isfinite(losses)], thinned(len(steps), CURVE_POINTS)
    parts = [slice(0 if not number else ends[number - 1] + 1, end + 1) for number, end in enumerate(ends)]
    return {
        "training": {
            "steps": int(steps[-1]),
            "last_loss": digits(finite[-10:].mean(), 5) if len(finite) else None,
            "rise_nats": digits(rise, 4),
            "rise_step": int(steps[place]),
            "largest_norm": _largest(norms),
            "lost_steps": int((~np.isfinite(norms)).sum()),
            "tokens_per_second": digits(np.median(columns["tokens_per_second"]), 4),
        },
        "curve": {
            "step": [int(steps[end]) for end in ends],
            "loss": [digits(losses[part].mean(), 5) for part in parts],
            "grad_norm": [_largest(norms[part]) for part in parts],
        },
    }


def _validation(run: Run) -> Tree | None:
    rows = [run.validation_rows[index] for index in thinned(len(run.validation_rows), VALIDATION_POINTS)]
    if not rows:
        return None
    losses = [row["validation_loss"] for row in rows]
    return {"tokens": [row["tokens"] for row in rows], "loss": [digits(loss, 6) for loss in losses]}


def _heads(run: Run) -> dict[str, Tree | None]:
    if not run.head_rows:
        return {}
    rows, last = run.head_rows, run.head_rows[-1]
    chosen = [rows[index] for index in spread(len(rows), ENTROPY_POINTS)]
    means = [as_array(row["entropy_nats"]).mean(axis=1) for row in chosen]
    threshold = last.get("threshold")
    return {
        "layers": {"step": [row["step"] for row in chosen], "entropy_nats": [_rounded(mean, 3) for mean in means]},
        "heads": {
            "step": last["step"],
            "entropy_nats": [_rounded(layer, 3) for layer in as_array(last["entropy_nats"])],
            "threshold": None if threshold is None else [_rounded(layer, 3) for layer in as_array(threshold)],
        },
    }


def thinned(count: int, most: int) -> list[int]:
    """Return at most `most` indices below `count`, evenly spread; the last one is the last."""
    return sorted({round((number + 1) * count / min(count, most)) - 1 for number in range(min(count, most))})


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` indices below `count`, first and last among them, at even ratios of index + 1."""
    return sorted({round(place) - 1 for place in np.geomspace(1, count, most)})


def digits(value: float | None, count: int) -> float | None:
    """Round to so many digits; None stays None, and what is not finite becomes None."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.{count}g}")


def _rounded(values: Sequence[float] | Array, count: int) -> list[float | None]:
    return [digits(value, count) for value in values]


def _largest(norms: Array) -> float | None:
    return digits(norms[np.isfinite(norms)].max(initial=-np.inf), 3)


def largest_rise(losses: Array) -> tuple[float, int]:
    """Find the largest rise of a loss over the running mean of the losses before it.

    Args:
        losses: [S]; only those before the first that is not finite count.

    Returns:
        The rise in nats and its index. The mean gives each new loss a weight of 0.1.
    """
    values = np.asarray(losses, dtype=float)
    mean, worst, place = values[0], 0.0, 0
    for index, value in enumerate(values):
        if not np.isfinite(value):
            break
        if value - mean > worst:
            worst, place = float(value - mean), index
        mean = 0.9 * mean + 0.1 * value
    return worst, place
