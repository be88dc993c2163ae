"""Load the points of every architecture, with what its models cost, from a suite of runs or a CSV file."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from train.cost.flops import training_flops_per_token
from train.private_inference import private_inference_cost
from train.scaling.analysis import FlopsPerToken, six_flops_per_parameter
from train.scaling.compare import along_ladder
from train.scaling.points import Points, PointsError, points_of, read_csv
from train.study.results import Record, grouped, records
from train.study.suite import SuiteError, load_suite

Array = NDArray[np.float64]
NONE = np.zeros(0)


@dataclass(frozen=True)
class Series:
    """One architecture's points, and what its models cost.

    Attributes:
        flops_per_token: training FLOPs a token at N parameters.
        communication_gb: of a private inference at N parameters; None for points from a CSV file.
        left_out: one line for each kind of point that was left out.
    """

    points: Points
    flops_per_token: FlopsPerToken = six_flops_per_parameter
    communication_gb: Callable[[Array], Array] | None = None
    left_out: tuple[str, ...] = ()


def load_series(
    source: Path,
    counted: str,
    columns: dict[str, str] | None = None,
    least_ratio: float = 0.0,
    overrides: list[str] | None = None,
) -> list[Series]:
    """Load a suite's results or a CSV file.

    Args:
        source: a suite file (.json) or a CSV file.
        counted: which parameters of a suite's models N counts, 'total' or 'body'.
        columns: CSV columns by hand, as in `read_csv`.
        least_ratio: points with fewer tokens a parameter are left out.
        overrides: those that the suite was run with.

    Raises:
        PointsError, SuiteError: the source cannot be read, or a suite's vocabulary size is unknown.
    """
    if source.suffix == ".json":
        series = _of_suite(source, counted, overrides or [])
    elif overrides:
        raise PointsError(f"{overrides[0]}: only a suite takes overrides, and {source} is read as CSV")
    else:
        series = [Series(points) for points in read_csv(source, columns)]
    kept = []
    for one in series:
        enough = one.points.tokens >= least_ratio * one.points.parameters
        dropped = (
            (f"{int((~enough).sum())} points below {least_ratio:g} tokens a parameter",) if not enough.all() else ()
        )
        kept.append(dataclasses.replace(one, points=one.points.where(enough), left_out=one.left_out + dropped))
    return kept


def _of_suite(path: Path, counted: str, overrides: list[str]) -> list[Series]:
    by_architecture: dict[str, list[Record]] = {}
    for record in records(load_suite(path, overrides)):
        if not record.vocab_size:
            raise SuiteError(
                f"{path}: {record.label}: its dataset is not at data.path, so that its parameters cannot be counted; "
                "add the data.path=DIR that it was run with, or data.planned_vocab_size=N"
            )
        by_architecture.setdefault(record.model.architecture, []).append(record)
    return [_series(name, members, counted) for name, members in by_architecture.items()]


def _series(name: str, members: list[Record], counted: str) -> Series:
    def size(record: Record) -> int:
        return record.parameters if counted == "total" else record.body_parameters

    lost = [
        f"{record.label}, {record.planned_tokens / 1e6:.3g}M tokens: {record.state.word}"
        for record in members
        if record.state.word in ("diverged", "failed", "other")
    ]
    best: dict[tuple[int, int], tuple[float, float]] = {}  # (N, D) -> loss and FLOPs
    seeds = 1
    for group in grouped(members):
        losses = [record.loss for record in group.records if record.loss is not None]
        if not losses:
            continue
        seeds = max(seeds, len(losses))
        key = (size(group.first), group.first.tokens)
        found = (mean(losses), group.first.flops)  # over seeds: their minimum would be biased low
        best[key] = min(best.get(key, found), found)  # of several learning rates the best counts
    if unreached := sum(record.state.word in ("new", "running", "partial") for record in members):
        lost.append(f"{unreached} results not reached yet")
    rows = [(n, d, loss, flops) for (n, d), (loss, flops) in best.items()]
    remarks = (f"losses are means over up to {seeds} seeds",) if seeds > 1 else ()
    models = {size(record): record for record in members}
    sizes = np.array(sorted(models), dtype=float)
    costs = [training_flops_per_token(models[n].model, models[n].vocab_size) for n in sorted(models)]
    gigabytes = [private_inference_cost(models[n].model, models[n].vocab_size).communication_gb for n in sorted(models)]
    points = points_of(name, rows, remarks) if rows else Points(name, NONE, NONE, NONE, NONE)
    return Series(points, along_ladder(sizes, np.array(costs)), along_ladder(sizes, np.array(gigabytes)), tuple(lost))
