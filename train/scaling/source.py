"""Points and costs of every architecture in a suite of runs or a CSV file, and the laws fitted to them."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.cost.flops import training_flops_per_token
from train.private_inference import private_inference_cost
from train.run.folder import write_atomically
from train.scaling.analysis import FlopsPerToken, HeldOut, exponents, held_out, six_flops_per_parameter
from train.scaling.compare import Curve, along_ladder
from train.scaling.law import Fit, FitError, LossLaw, bootstrap, fit, interval
from train.scaling.outliers import FAR, Outliers, outliers
from train.scaling.points import Points, PointsError, points_of, read_csv
from train.study.results import Record, grouped, records
from train.study.suite import SuiteError, load_suite

Array = NDArray[np.float64]
NONE = np.zeros(0)
COEFFICIENTS = ("E", "A", "alpha", "B", "beta")


@dataclass(frozen=True)
class Series:
    """One architecture's points with what its models cost.

    Attributes:
        communication_gb: of a private inference at N parameters; None for points from a CSV file.
        left_out: what is not among the points, one line each.
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
    """Reads a suite's results or a CSV file.

    Args:
        counted: which parameters of a suite's models are N, 'total' or 'body'.
        least_ratio: points with fewer tokens a parameter are left out.
        overrides: of a suite, those that it was run with.

    Raises:
        PointsError, SuiteError: the source cannot be read, or the size of a suite's vocabulary is unknown.
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
        found = (mean(losses), group.first.flops)  # over seeds: the least of them would be biased low
        best[key] = min(best.get(key, found), found)  # of swept rates the best counts
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


@dataclass(frozen=True)
class Analysis:
    """A series with its law.

    Attributes:
        without: the analysis of the points that are not outliers, where there are outliers and enough others.
    """

    series: Series
    fit: Fit
    resamples: list[LossLaw]
    held_out: HeldOut | None
    outliers: Outliers
    without: "Analysis | None" = None

    @property
    def name(self) -> str:
        return self.series.points.name

    @property
    def curve(self) -> Curve:
        one = self.series
        return Curve(self.name, self.fit.law, self.resamples, one.flops_per_token, one.communication_gb)

    def intervals(self) -> dict[str, tuple[float, float]]:
        found = {key: interval([getattr(law, key) for law in self.resamples]) for key in COEFFICIENTS}
        found["a"] = interval([exponents(law)[0] for law in self.resamples])
        return found


def analyse_all(
    series: list[Series], resamples: int, without_outliers: bool = False
) -> tuple[list[Analysis], list[str]]:
    """The analyses, and a line for each series whose points do not determine a law."""
    found, failures = [], []
    for one in series:
        try:
            analysis = analyse(one, resamples)
        except FitError as error:
            failures.append(f"{one.points.name}: no law: {error}")
            continue
        found.append(analysis.without or analysis if without_outliers else analysis)
    return found, failures


def analyse(series: Series, resamples: int, seed: int = 1) -> Analysis:
    """Fits, resamples and holds out; the same again without outliers.

    Raises:
        FitError: the points do not determine a law.
    """
    found = _analysis(series, resamples, seed)
    far = found.outliers.far
    if not far.any():
        return found
    words = f"{far.sum()} outliers, more than {FAR:g} robust standard deviations off the law of the others"
    others = dataclasses.replace(series, points=series.points.where(~far), left_out=(*series.left_out, words))
    try:
        return dataclasses.replace(found, without=_analysis(others, resamples, seed))
    except FitError:
        return found


def _analysis(series: Series, resamples: int, seed: int) -> Analysis:
    points = series.points
    found = fit(points.parameters, points.tokens, points.losses)
    laws = bootstrap(found.law, points.parameters, points.tokens, points.losses, resamples, seed)
    return Analysis(series, found, laws, held_out(points), outliers(points, found.law))


def save_fits(path: Path, source: Path, counted: str, analyses: list[Analysis]) -> None:
    """A file that `predict` reads."""
    tree: dict[str, Any] = {"source": str(source), "parameters": counted, "architectures": {}}
    for one in analyses:
        points = one.series.points
        tree["architectures"][points.name] = {
            **one.fit.law.as_row(),
            "intervals": one.intervals(),
            "objective": one.fit.objective,
            "points": len(points),
            "loss_unit": points.unit,
            "left_out": one.series.left_out,
            "range_parameters": [points.parameters.min(), points.parameters.max()],
            "range_tokens": [points.tokens.min(), points.tokens.max()],
            "resamples": [list(law.as_row().values()) for law in one.resamples],
        }
    write_atomically(path, json.dumps(tree) + "\n")


def read_fits(path: Path) -> dict[str, tuple[LossLaw, list[LossLaw], dict[str, Any]]]:
    """Architecture -> law, resamples and the rest.

    Raises:
        PointsError: it is no file that `save_fits` writes; says where.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), parse_int=float)
    except FileNotFoundError:
        raise PointsError(f"{path}: no such file; fit --output {path} writes one") from None
    except (OSError, ValueError) as error:
        raise PointsError(f"{path}: cannot be read as JSON ({error}); expected what fit --output writes") from None
    rows = tree.get("architectures") if isinstance(tree, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise PointsError(f"{path}: has no architectures, a name and a law each; expected what fit --output writes")
    return {name: _read_law(f"{path}: {name}", row) for name, row in rows.items()}


def _read_law(where: str, row: Any) -> tuple[LossLaw, list[LossLaw], dict[str, Any]]:
    if not isinstance(row, dict):
        raise PointsError(f"{where}: expected an object of coefficients; write the file anew with fit --output")
    resamples = row.get("resamples")
    checked = [
        (", ".join(COEFFICIENTS), "5 finite numbers", _are_numbers([row.get(key) for key in COEFFICIENTS], 5)),
        ("range_parameters", "2 finite numbers", _are_numbers(row.get("range_parameters"), 2)),
        ("range_tokens", "2 finite numbers", _are_numbers(row.get("range_tokens"), 2)),
        ("loss_unit", "words", isinstance(row.get("loss_unit", ""), str)),
        ("resamples", "a list of at least one law, 5 numbers each", isinstance(resamples, list) and resamples
         and all(_are_numbers(law, 5, finite=False) for law in resamples)),
    ]  # fmt: skip
    for key, expected, is_right in checked:
        if not is_right:
            raise PointsError(f"{where}: {key}: expected {expected}; write the file anew with fit --output")
    law = LossLaw(**{key: row[key] for key in COEFFICIENTS})
    return law, [LossLaw(*values) for values in row["resamples"]], row


def _are_numbers(values: Any, count: int, finite: bool = True) -> bool:
    """Whether it is a list of so many floats; a resample may hold infinities."""
    is_list = isinstance(values, list) and len(values) == count and all(isinstance(value, float) for value in values)
    return is_list and (not finite or all(map(math.isfinite, values)))
