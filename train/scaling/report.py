"""Write the report of scaling laws: coefficients, held-out error, allocation, and where two architectures cross."""

from itertools import combinations
from pathlib import Path

import numpy as np

from train.scaling.analysis import compute_optimal, isoflops, power_law
from train.scaling.compare import Crossing, compare
from train.scaling.fits import Analysis
from train.scaling.law import interval
from train.scaling.points import Points
from train.scaling.source import Series
from train.scaling.summary import coefficient_table, doubts, outlier_table, outliers_text, series_text
from train.study.report.document import Document

DECADES_BEYOND = 3  # of compute beyond the runs, for allocations and crossings
RESAMPLES_COMPARED = 200
MOST_COLUMNS = 10


def write_report(
    folder: Path,
    source: Path,
    counted: str,
    series: list[Series],
    analyses: list[Analysis],
    failures: list[str],
    note: str = "",
) -> list[Path]:
    """Write report.md, report.html and the pictures; return the paths of the two reports.

    Args:
        folder: of the report.
        source: the suite or CSV file.
        counted: which parameters N counts, in brackets; empty for a CSV file, which has its own count.
        series: the points of every architecture.
        analyses: of those whose points determine a law.
        failures: a line for each of the others.
        note: a sentence for the top of the report.
    """
    document = Document(folder, f"Scaling laws of {source.stem}")
    known = {one.name: one.series for one in analyses}  # without outliers, where they are left out
    for points in series:
        name = points.points.name
        document.text(f"**{name}**: {series_text(known.get(name, points), counted)}")
    for line in failures:
        document.text(line)
    if note:
        document.text(note)
    _losses(document, series)
    if not analyses:
        return document.write()
    document.heading("L(N, D) = E + A / N^alpha + B / D^beta")
    document.table(*coefficient_table(analyses))
    document.text(
        "Fitted with Huber's loss (delta 1e-3) of the residuals of ln L. Brackets are 95% intervals of a bootstrap "
        "over points. a is the exponent of N_opt ~ C^a. Held out: the fifth of the runs with the most compute, "
        "predicted from the rest."
    )
    for one in analyses:
        for line in doubts(one):
            document.text(f"**Warning**: {one.name}: {line}.")
        _outliers(document, one)
    _single_pictures(document, analyses)
    _allocation(document, analyses)
    for first, second in combinations(analyses, 2):
        _comparison(document, first, second)
    return document.write()


def _losses(document: Document, series: list[Series]) -> None:
    """Add a table of the points, unless it would be too wide to read."""
    lengths = sorted({float(tokens) for one in series for tokens in one.points.tokens})
    if not lengths or len(lengths) > MOST_COLUMNS:
        return
    document.heading(f"Losses in {series[0].points.unit}")
    rows = []
    for one in series:
        points = one.points
        found = dict(zip(zip(points.parameters, points.tokens, strict=True), points.losses, strict=True))
        for size in sorted(set(points.parameters)):
            cells = [f"{found[size, tokens]:.4f}" if (size, tokens) in found else "-" for tokens in lengths]
            rows.append([points.name, f"{size:,.0f}", *cells])
    document.table(["architecture", "parameters", *(f"{tokens / 1e6:.3g}M tokens" for tokens in lengths)], rows)


def _outliers(document: Document, one: Analysis) -> None:
    if not one.outliers.far.any():
        return
    document.text(f"**{one.name}**: {outliers_text(one)}")
    header, rows = outlier_table(one)
    document.table(header, rows)


def _single_pictures(document: Document, analyses: list[Analysis]) -> None:
    from train.scaling import pictures

    for number, one in enumerate(analyses):
        points = one.series.points
        document.picture(f"fit_{number}", pictures.fit_figure(points, one.fit.law), f"{points.name}: points and law")
        curves = isoflops(points)
        if len(curves) < 2:
            document.text(f"{points.name}: too few sizes at equal compute for isoFLOP parabolas.")
            continue
        exponent, _ = power_law([curve.flops for curve in curves], [curve.best_parameters for curve in curves])
        caption = f"{points.name}: isoFLOP parabolas; their minima give N_opt ~ C^{exponent:.3f}"
        document.picture(f"isoflop_{number}", pictures.isoflop_figure(curves, points.name, points.unit), caption)


def _allocation(document: Document, analyses: list[Analysis]) -> None:
    document.heading("Compute-optimal allocation")
    rows = []
    for one in analyses:
        low, high = one.series.points.flops.min(), one.series.points.flops.max()
        budgets = 10.0 ** np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + DECADES_BEYOND + 1)
        best = compute_optimal(one.fit.law, budgets, one.series.flops_per_token)
        resampled = [
            compute_optimal(law, budgets, one.series.flops_per_token, 401) for law in one.resamples[:RESAMPLES_COMPARED]
        ]
        for index, budget in enumerate(budgets):
            sizes = interval([other.parameters[index] for other in resampled])
            losses = interval([other.losses[index] for other in resampled])
            rows.append([
                one.series.points.name, f"{budget:.0e}", 
                f"{best.parameters[index]:.3g} [{sizes[0]:.2g}, {sizes[1]:.2g}]",
                f"{best.tokens[index]:.3g}", f"{best.tokens[index] / best.parameters[index]:.3g}",
                f"{best.losses[index]:.3f} [{losses[0]:.3f}, {losses[1]:.3f}]",
                "extrapolated" if budget > high else "",
            ])  # fmt: skip
    document.table(["architecture", "training FLOPs", "parameters", "tokens", "tokens/parameter", "loss", ""], rows)


def _comparison(document: Document, first: Analysis, second: Analysis) -> None:
    from train.scaling import pictures

    names = f"{first.series.points.name} against {second.series.points.name}"
    document.heading(names)
    both = (first.series.points, second.series.points)
    beyond = 10.0**DECADES_BEYOND
    ranges = [
        (min(getattr(p, key).min() for p in both), max(getattr(p, key).max() for p in both))
        for key in ("parameters", "tokens", "flops")
    ]
    looked_at = [(low, high * beyond) for low, high in ranges]
    at_parameters, at_tokens = (float(min(getattr(p, key).max() for p in both)) for key in ("parameters", "tokens"))
    _measured_gaps(document, *both)
    sizes, lengths, budgets = looked_at
    found = compare(first.curve, second.curve, sizes, lengths, budgets, (at_parameters, at_tokens))
    document.table(
        ["axis", "better below", "losses equal at", "95% of resamples", "resamples that cross", ""],
        [_crossing_row(crossing, measured) for crossing, measured in zip(found, _measured(found, ranges), strict=True)],
    )
    document.text(
        "Where the two laws cross. The size and length held fixed are the largest that both have. The search goes "
        f"{DECADES_BEYOND} decades beyond the runs. Crossings beyond the runs extrapolate two laws, and are no more "
        "certain than their intervals."
    )
    pair = f"{both[0].name}_{both[1].name}"
    stem = "".join(character if character.isalnum() else "-" for character in pair)
    figure = pictures.frontier_figure([first.curve, second.curve], looked_at[2], both[0].unit)
    document.picture(f"frontier_{stem}", figure, names)
    if first.series.communication_gb is not None and second.series.communication_gb is not None:
        figure = pictures.communication_figure([first.curve, second.curve], ranges[0], at_tokens)
        document.picture(f"communication_{stem}", figure, f"{names}: loss against communication")


def _measured_gaps(document: Document, first: Points, second: Points) -> None:
    """Add measured losses of the first minus those of the second, at equal N and D, without a law."""
    lengths = sorted(set(first.tokens) & set(second.tokens))
    rows = []
    for size in sorted(set(first.parameters)):
        cells = [_gap(first, second, size, length) for length in lengths]
        if any(np.isfinite(cells)):
            rows.append([f"{size:,.0f}", *(f"{cell:+.3f}" if np.isfinite(cell) else "-" for cell in cells)])
    if not rows or len(lengths) > MOST_COLUMNS:
        return
    document.table(["parameters", *(f"{tokens / 1e6:.3g}M tokens" for tokens in lengths)], rows)
    document.text(
        f"Measured: loss of {first.name} minus that of {second.name} at equal parameters and tokens. The latter is "
        f"interpolated between its two nearest sizes (linear in ln N). Below zero, {first.name} is better."
    )


def _gap(first: Points, second: Points, size: float, length: float) -> float:
    mine = first.losses[(first.parameters == size) & (first.tokens == length)]
    theirs = second.where(second.tokens == length)
    order = np.argsort(theirs.parameters)
    logs = np.log(theirs.parameters[order])
    if not len(mine) or not len(logs):
        return float("nan")
    other = np.interp(np.log(size), logs, theirs.losses[order], left=np.nan, right=np.nan)
    return float(mine.mean() - other)


def _measured(found: list[Crossing], ranges: list[tuple[float, float]]) -> list[float]:
    """Return the end of the measured range on each crossing's axis; communication has none."""
    ends = [ranges[0][1], ranges[1][1], ranges[2][1]]
    return [ends[index] if index < len(ends) else float("inf") for index in range(len(found))]


def _crossing_row(crossing: Crossing, measured: float) -> list[str]:
    at = (
        ", ".join(f"{value:.3g}" for value in crossing.at)
        or f"nowhere in {crossing.range[0]:.2g} to {crossing.range[1]:.2g}"
    )
    between = f"{crossing.interval[0]:.3g} to {crossing.interval[1]:.3g}" if crossing.interval else "-"
    share = f"{crossing.share:.0%}" if np.isfinite(crossing.share) else "-"
    remark = "extrapolated" if crossing.at and crossing.at[0] > measured else ""
    return [crossing.axis, crossing.below, at, between, share, remark]
