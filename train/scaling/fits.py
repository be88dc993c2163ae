"""Fit a law to each architecture's points, and keep the laws in a file for `predict`."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files.own import write_atomically
from data.files.strict_json import read_json, to_json
from train.scaling.analysis import HeldOut, exponents, held_out
from train.scaling.compare import Curve
from train.scaling.law import Fit, FitError, LossLaw, bootstrap, fit, interval
from train.scaling.outliers import FAR, Outliers, outliers
from train.scaling.points import PointsError
from train.scaling.source import Series

COEFFICIENTS = ("E", "A", "alpha", "B", "beta")


@dataclass(frozen=True)
class Analysis:
    """A series with its law.

    Attributes:
        resamples: laws of the bootstrap.
        held_out: how well the cheaper runs predict the dearest; None if too few remain to fit.
        without: the analysis without outliers; None if there are none, or too few other points.
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
        """Return the 95% interval of each coefficient and of the exponent a."""
        found = {key: interval([getattr(law, key) for law in self.resamples]) for key in COEFFICIENTS}
        found["a"] = interval([exponents(law)[0] for law in self.resamples])
        return found


def analyse_all(
    series: list[Series], resamples: int, without_outliers: bool = False
) -> tuple[list[Analysis], list[str]]:
    """Analyse every series.

    Args:
        series: the points of each architecture.
        resamples: number of bootstrap resamples.
        without_outliers: whether to return the analysis without outliers where there is one.

    Returns:
        The analyses, and a line for each series whose points do not determine a law.
    """
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
    """Fit a law, resample it, predict held-out runs, and find outliers; then do the same without the outliers.

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
    """Write the file that `predict` reads. In it, null is a coefficient or an end of an interval that is not finite."""
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
    write_atomically(path, to_json(tree) + "\n")


def read_fits(path: Path) -> dict[str, tuple[LossLaw, list[LossLaw], dict[str, Any]]]:
    """Read a file that `save_fits` wrote.

    Returns:
        Architecture -> (law, laws of the bootstrap, the row of the file).

    Raises:
        PointsError: the file is something else; says where.
    """
    try:
        tree = read_json(path)
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
    row = _with_floats(row)
    resamples = row.get("resamples")
    checked = [
        (", ".join(COEFFICIENTS), "5 finite numbers", _are_numbers([row.get(key) for key in COEFFICIENTS], 5)),
        ("range_parameters", "2 finite numbers", _are_numbers(row.get("range_parameters"), 2)),
        ("range_tokens", "2 finite numbers", _are_numbers(row.get("range_tokens"), 2)),
        ("loss_unit", "words", isinstance(row.get("loss_unit", ""), str)),
        ("resamples", "a list of at least one law, 5 numbers each", isinstance(resamples, list) and resamples
         and all(_are_numbers(_unbounded(law), 5, finite=False) for law in resamples)),
    ]  # fmt: skip
    for key, expected, is_right in checked:
        if not is_right:
            raise PointsError(f"{where}: {key}: expected {expected}; write the file anew with fit --output")
    law = LossLaw(**{key: row[key] for key in COEFFICIENTS})
    return law, [LossLaw(*_unbounded(values)) for values in row["resamples"]], row


def _with_floats(value: Any) -> Any:
    """Return a JSON value with its whole numbers as floats."""
    if isinstance(value, dict):
        return {key: _with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return float(value) if type(value) is int else value


def _unbounded(law: Any) -> Any:
    """Return a resample's coefficients with infinity for null: it is written for one that no float holds."""
    return [math.inf if value is None else value for value in law] if isinstance(law, list) else law


def _are_numbers(values: Any, count: int, finite: bool = True) -> bool:
    """Whether it is a list of `count` floats; those of a resample may be infinite."""
    is_list = isinstance(values, list) and len(values) == count and all(isinstance(value, float) for value in values)
    return is_list and (not finite or all(map(math.isfinite, values)))
