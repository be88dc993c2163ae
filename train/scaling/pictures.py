"""Draw scaling laws: points, laws and their resamples in, figures out."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.pictures.style import INK, PALETTE, new_figure, tidy
from train.scaling.analysis import IsoFlop, compute_optimal
from train.scaling.compare import Curve
from train.scaling.law import LossLaw
from train.scaling.points import NATS, Array, Points

MOST_LINES = 8
BAND_RESAMPLES = 100


def fit_figure(points: Points, law: LossLaw) -> Figure:
    """Draw losses against parameters, coloured by tokens, and the law's lines at up to MOST_LINES token counts."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    tidy(axes)
    logs = np.log(points.tokens)
    span = max(float(np.ptp(logs)), 1e-9)
    colours = colormaps["viridis"]
    axes.scatter(points.parameters, points.losses, c=(logs - logs.min()) / span, cmap=colours, s=18, zorder=3)
    sizes = np.geomspace(points.parameters.min() / 1.3, points.parameters.max() * 1.3, 100)
    distinct = np.unique(points.tokens)
    for tokens in distinct[np.unique(np.linspace(0, len(distinct) - 1, MOST_LINES).astype(int))]:
        colour = colours(0.95 * (np.log(tokens) - logs.min()) / span)
        axes.plot(sizes, law.loss(sizes, tokens), color=colour, linewidth=1.1, label=f"{tokens:.3g} tokens")
    axes.set_xscale("log")
    axes.set(xlabel="parameters", ylabel=f"loss ({points.unit})")
    axes.set_title(points.name, fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=7)
    return figure


def isoflop_figure(curves: Sequence[IsoFlop], title: str, unit: str) -> Figure:
    """Draw loss against parameters at equal compute, with the parabolas and their minima."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    tidy(axes)
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(curves)))
    for curve, colour in zip(curves, colours, strict=True):
        axes.plot(curve.parameters, curve.losses, "o", color=colour, markersize=4)
        sizes = np.geomspace(curve.parameters.min(), curve.parameters.max(), 60)
        line = np.polyval(curve.coefficients, np.log(sizes))
        axes.plot(sizes, line, color=colour, linewidth=1.2, label=f"{curve.flops:.2g} FLOPs")
        axes.plot(curve.best_parameters, curve.best_loss, "*", color=colour, markersize=11, zorder=4)
    axes.set_xscale("log")
    axes.set(xlabel="parameters", ylabel=f"loss ({unit})")
    axes.set_title(title, fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=7, title="compute", title_fontsize=7)
    return figure


def frontier_figure(curves: Sequence[Curve], flops: tuple[float, float], unit: str) -> Figure:
    """Draw the loss at the optimal size against training FLOPs, with 95% bands of the resamples."""
    figure = new_figure(6.8, 4.2)
    axes = figure.subplots()
    budgets = np.geomspace(*flops, 60)
    for index, curve in enumerate(curves):
        laws = [curve.law, *curve.resamples[:BAND_RESAMPLES]]
        lines = np.array([compute_optimal(law, budgets, curve.flops_per_token, 301).losses for law in laws])
        _band(axes, budgets, lines, index, curve.name)
    axes.set(xlabel="training FLOPs, each spent at the optimal size", ylabel=f"loss ({unit})")
    axes.legend(frameon=False, fontsize=8)
    return figure


def communication_figure(curves: Sequence[Curve], sizes: tuple[float, float], tokens: float) -> Figure:
    """Draw loss against communication of a private inference, along each architecture's sizes at one token count.

    Only suites know the communication, and their losses are in nats.
    """
    figure = new_figure(6.8, 4.2)
    axes = figure.subplots()
    parameters = np.geomspace(*sizes, 60)
    for index, curve in enumerate(curves):
        assert curve.communication_gb is not None
        laws = [curve.law, *curve.resamples[:BAND_RESAMPLES]]
        lines = np.array([law.loss(parameters, tokens) for law in laws])
        _band(axes, curve.communication_gb(parameters), lines, index, curve.name)
    axes.set(xlabel=f"communication (GB), models trained on {tokens:.3g} tokens", ylabel=f"loss ({NATS})")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _band(axes: Axes, x: Array, lines: Array, index: int, name: str) -> None:
    """Draw the first line, and the range of 95% of all lines."""
    tidy(axes)
    colour = PALETTE[index % len(PALETTE)]
    low, high = np.nanpercentile(lines, (2.5, 97.5), axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, lines[0], color=colour, linewidth=1.6, label=name)
    axes.set_xscale("log")
