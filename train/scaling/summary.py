"""Describe an analysis in words and tables, for the terminal and the report."""

import numpy as np

from train.scaling.analysis import exponents
from train.scaling.fits import COEFFICIENTS, Analysis
from train.scaling.law import DELTA
from train.scaling.outliers import FAR
from train.scaling.source import Series

Table = tuple[list[str], list[list[str]]]
MOST_OUTLIERS = 20  # listed; more are a pattern, not outliers


def series_text(series: Series, counted: str) -> str:
    """Say how many points of which range there are, and what was left out; `counted` as in `write_report`."""
    points = series.points
    notes = [f"Left out: {'; '.join(series.left_out)}"] if series.left_out else []
    if not len(points):
        return ". ".join(["no points", *notes, *points.remarks]) + "."
    ranges = (
        f"{len(points)} points, {points.parameters.min():.3g} to {points.parameters.max():.3g} parameters{counted}, "
        f"{points.tokens.min():.3g} to {points.tokens.max():.3g} tokens, losses in {points.unit}"
    )
    return ". ".join([ranges, *notes, *(remark[0].upper() + remark[1:] for remark in points.remarks)]) + "."


def coefficient_table(analyses: list[Analysis]) -> Table:
    """Return a row for each analysis, and below it one without its outliers."""
    header = ["architecture", *COEFFICIENTS, "a", "objective", "starts at the best", "held-out error"]
    rows = []
    for one in analyses:
        rows.append([one.name, *_cells(one)])
        if one.without is not None:
            rows.append([f"{one.name}, outliers left out", *_cells(one.without)])
    return header, rows


def _cells(one: Analysis) -> list[str]:
    intervals = one.intervals()
    values = {**one.fit.law.as_row(), "a": exponents(one.fit.law)[0]}
    cells = [f"{values[key]:.4g} [{intervals[key][0]:.3g}, {intervals[key][1]:.3g}]" for key in (*COEFFICIENTS, "a")]
    agreeing = f"{one.fit.agreeing} of the best 40 of {one.fit.starts}"
    return [*cells, f"{one.fit.objective:.4g}", agreeing, held_out_text(one)]


def doubts(one: Analysis) -> list[str]:
    """Return one line for each reason why the law means nothing beyond its points."""
    law, points = one.fit.law, one.series.points
    if np.ptp(np.log(points.losses)) < DELTA:
        return [f"all losses lie within {DELTA:.1%} of each other: no coefficient means anything"]
    negligible = DELTA * points.losses.min()
    lines = []
    for word, counts, name, factor, exponent in (
        ("parameters", points.parameters, "alpha", law.A, law.alpha),
        ("tokens", points.tokens, "beta", law.B, law.beta),
    ):
        if exponent <= 0:
            lines.append(f"{name} = {exponent:.3g} is not positive: losses do not fall with {word}; do not extrapolate")
        elif factor * counts.min() ** -exponent < negligible:
            lines.append(f"losses hardly depend on {word}: {name} = {exponent:.3g} means nothing")
    if negligible > law.E:
        lines.append(f"E = {law.E:.3g} is about 0: the points show no floor of the loss; do not extrapolate")
    return lines


def held_out_text(one: Analysis) -> str:
    """Say how far the law of the cheaper runs is off the dearest ones."""
    if one.held_out is None:
        return "too few points"
    errors = np.abs(one.held_out.relative_errors)
    return f"{errors.mean():.2%} on average, {errors.max():.2%} at most, over {len(errors)}"


def outliers_text(one: Analysis) -> str:
    """Say how many outliers there are and what they do to the law; empty if there are none."""
    count = int(one.outliers.far.sum())
    if not count:
        return ""
    points, far = one.series.points, one.outliers.far
    ratios = points.tokens / points.parameters
    text = (
        f"{count} {'point lies' if count == 1 else 'points lie'} more than {FAR:g} robust standard deviations "
        f"({one.outliers.spread:.2%} each) off the law of the others, at {_range(ratios[far])} tokens a parameter; the "
        f"others are at {_range(ratios[~far])}. "
    )
    if one.without is None:
        return text + "The others are too few for a law of their own."
    moves = [
        f"{key} from {getattr(one.fit.law, key):.3g} to {getattr(one.without.fit.law, key):.3g}"
        for key in ("alpha", "beta", "E")
    ]
    them = "it" if count == 1 else "them"
    return text + f"Leaving {them} out, as --without-outliers does, moves {', '.join(moves)}."


def _range(values: np.ndarray) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}"


def outlier_table(one: Analysis) -> Table:
    """Return a row for each outlier, farthest first."""
    points, found = one.series.points, one.outliers
    order = np.argsort(-np.abs(found.deviations))[: min(MOST_OUTLIERS, int(found.far.sum()))]
    rows = []
    for index in order:
        n, d, loss = points.parameters[index], points.tokens[index], points.losses[index]
        law = float(found.law.loss(n, d))
        rows.append([f"{n:.4g}", f"{d:.4g}", f"{d / n:.3g}", f"{loss:.4f}", f"{law:.4f}", f"{loss / law - 1:+.1%}",
                     f"{found.deviations[index]:+.1f}"])  # fmt: skip
    return ["parameters", "tokens", "tokens/parameter", "loss", "law of the others", "off", "deviations"], rows


def lines_of(table: Table, turned: bool = False) -> list[str]:
    """Format a table for the terminal; if turned, its rows become columns."""
    header, rows = table
    grid = [header, *rows]
    if turned:
        grid = [list(column) for column in zip(*grid, strict=True)]
    widths = [max(len(cell) for cell in column) for column in zip(*grid, strict=True)]
    align = str.ljust if turned else str.rjust
    return ["  ".join(align(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in grid]
