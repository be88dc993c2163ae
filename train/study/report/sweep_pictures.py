"""Draw sweeps: loss against the swept value, layer entropies beside it, and loss at the best value against cost."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from train.pictures.style import INK, LINE_STYLES, MUTED, PALETTE, Array, new_figure, tidy

MOST_ABOVE_NATS = 1.0
"""Losses so far above the best are drawn at the top edge: the valleys are what is compared."""
COLUMNS = 4
LABEL_HEIGHT = 0.055
"""Of a direct label, as a share of the axes."""


@dataclass(frozen=True)
class Point:
    """All runs of an arm at one value.

    Attributes:
        value: of the swept key.
        losses: of the runs that were not lost, one a seed, nats a token.
        lost: number of lost runs.
        layers: mean entropy of each layer at the chosen step, [L] in nats; None if it was not logged.
        entropy_step: that step; 0 without layers.
    """

    value: float
    losses: tuple[float, ...]
    lost: int = 0
    layers: Array | None = None
    entropy_step: int = 0


@dataclass(frozen=True)
class Line:
    """An arm's sweep; `ceiling_nats` is the largest mean entropy of its heads."""

    name: str
    points: Sequence[Point]
    ceiling_nats: float = field(default=1.0)


def sweep_figure(lines: Sequence[Line], key: str) -> Figure:
    """Draw a U-curve for each arm, and below them the layer entropies of each arm at one step.

    Dots are seeds, lines their means. A value where arms lost runs is a cross at the top edge, with a row for each arm.

    Args:
        lines: one an arm, points by rising value.
        key: that is swept, say 'optimizer.learning_rate'.
    """
    with_layers = [line for line in lines if any(point.layers is not None for point in line.points)]
    rows = -(-len(with_layers) // COLUMNS)
    figure = new_figure(9.6, 4.6 + 2.1 * rows)
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[4.6, *[2.1] * rows])
    axes = figure.add_subplot(grid[0, :])
    _curves(axes, lines, key)
    values = sorted({point.value for line in lines for point in line.points})
    colours = dict(zip(values, colormaps["viridis"](np.linspace(0, 0.88, len(values))), strict=True))
    first: Axes | None = None
    for index, line in enumerate(with_layers):
        panel = figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS], sharey=first)
        first = first or panel
        _entropies(panel, line, colours, _style(lines.index(line))[0])
        panel.tick_params(labelleft=index % COLUMNS == 0)
        if index % COLUMNS == 0:
            panel.set_ylabel("mean entropy\n(nats)")
    if first is not None:
        handles = [first.plot([], [], color=colours[value], linewidth=1.5, label=f"{value:g}")[0] for value in values]
        title = key.partition(".")[2].replace("_", " ")
        figure.legend(
            handles=handles, title=title, loc="outside right lower", frameon=False, fontsize=8, title_fontsize=8
        )
    return figure


def _style(index: int) -> tuple[str, str]:
    """Return the colour and the line style of an arm."""
    return PALETTE[index % len(PALETTE)], LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]


def _curves(axes: Axes, lines: Sequence[Line], key: str) -> None:
    tidy(axes)
    points = [point for line in lines for point in line.points]
    losses = [loss for point in points for loss in point.losses if not point.lost]
    low = min(losses, default=0.0)
    high = min(max(losses, default=1.0), low + MOST_ABOVE_NATS)
    margin = 0.06 * (high - low) or 0.05
    top = high + margin
    axes.set(ylim=(low - margin, top), xscale="log")
    ends, at_top = [], dict[float, None]()
    rows_above = 0
    for index, line in enumerate(lines):
        colour, style = _style(index)
        heights = [_height(point, high) for point in line.points]
        for (left, y0), (right, y1) in itertools.pairwise(zip(line.points, heights, strict=True)):
            x = [left.value, right.value]
            if y0 is None or y1 is None:
                both = [top if y is None else y for y in (y0, y1)]
                axes.plot(x, both if both != [top, top] else [np.nan] * 2, ":", color=colour, linewidth=0.8)
            else:
                axes.plot(x, [y0, y1], style, color=colour, linewidth=1.7)
        for point, height in zip(line.points, heights, strict=True):
            seeds = [loss for loss in point.losses if loss <= high]
            axes.plot([point.value] * len(seeds), seeds, "o", color=colour, alpha=0.35, markersize=3, markeredgewidth=0)
            if height is not None:
                axes.plot(point.value, height, "o", color=colour, markersize=5)
        above = [point for point, height in zip(line.points, heights, strict=True) if height is None]
        if above:
            rows_above += 1
            at_top.update(dict.fromkeys(point.value for point in above))
            offset = (0, 10 * rows_above - 4)
            for point in above:
                axes.annotate(_lost_words(point), (point.value, top), offset, fontsize=7, textcoords="offset points",
                              ha="center", color=colour)  # fmt: skip
            axes.annotate(line.name, (1.02, 1), (0, offset[1]), fontsize=7, xycoords="axes fraction",
                          textcoords="offset points", color=colour)  # fmt: skip
        inside = [(point.value, y) for point, y in zip(line.points, heights, strict=True) if y is not None]
        ends.append(inside[-1] if inside else (line.points[-1].value, top))
    axes.plot(list(at_top), [top] * len(at_top), "x", color=INK, markersize=6, markeredgewidth=1.6, clip_on=False)
    _labels(axes, [line.name for line in lines], ends)
    values = sorted({point.value for point in points})
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=_words(key), ylabel="validation loss (nats a token)")


def _height(point: Point, high: float) -> float | None:
    """Return the mean loss of a point; None if it belongs at the top edge: runs are lost, or it is off the scale."""
    loss = float(np.mean(point.losses)) if point.losses else np.inf
    return None if point.lost or loss > high else loss


def _lost_words(point: Point) -> str:
    if not point.lost:
        return f"{np.mean(point.losses):.2f}"
    total = point.lost + len(point.losses)
    return f"{point.lost} of {total} lost" if total > 1 else "lost"


def _words(key: str) -> str:
    return key.partition(".")[2].replace("_", " ")


def _labels(axes: Axes, names: Sequence[str], ends: Sequence[tuple[float, float]]) -> None:
    """Write each name right of the axes at the height of its curve's end, moved so that none covers another."""
    bottom, top = axes.get_ylim()
    heights = [(y - bottom) / (top - bottom) for _, y in ends]
    order = sorted(range(len(names)), key=lambda index: heights[index])
    placed = apart([heights[index] for index in order], LABEL_HEIGHT)
    for index, height in zip(order, placed, strict=True):
        axes.annotate(names[index], ends[index], (1.03, height), textcoords="axes fraction", fontsize=8, va="center",
                      color=_style(index)[0], annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": _style(index)[0], "linewidth": 0.5, "alpha": 0.5,
                                  "shrinkB": 4})  # fmt: skip


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Move rising heights so that neighbours are at least so far apart and the whole stays centred where it was."""
    groups: list[list[float]] = [[height] for height in heights]
    centres = [height for height in heights]
    merged = True
    while merged:
        merged = False
        for index in range(len(groups) - 1):
            reach = least * (len(groups[index]) + len(groups[index + 1])) / 2
            if centres[index + 1] - centres[index] < reach - 1e-12:
                groups[index : index + 2] = [groups[index] + groups[index + 1]]
                centres[index : index + 2] = [float(np.mean(groups[index]))]
                merged = True
                break
    placed = []
    for group, centre in zip(groups, centres, strict=True):
        placed += [centre + least * (number - (len(group) - 1) / 2) for number in range(len(group))]
    return placed


def _entropies(axes: Axes, line: Line, colours: dict[float, Array], colour: str) -> None:
    tidy(axes)
    axes.axhline(line.ceiling_nats, color=MUTED, linestyle="--", linewidth=0.8)
    for point in line.points:
        if point.layers is not None:
            style = ":" if point.lost else "-"
            axes.plot(
                point.layers, color=colours[point.value], linewidth=1.4, linestyle=style, marker=".", markersize=4
            )
    steps = {point.entropy_step for point in line.points if point.layers is not None}
    when = f"step {min(steps)}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
    axes.set_title(f"{line.name}\n{when}", fontsize=7, color=colour)
    axes.set_ylim(0, 1.08 * line.ceiling_nats)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


@dataclass(frozen=True)
class CostPoint:
    """An arm at its best value.

    Attributes:
        name: of the arm.
        communication_gb: of a private inference, predicted.
        loss: nats a token.
        half_width: of its interval; None for one seed.
        at_edge: whether the best value is not bracketed.
    """

    name: str
    communication_gb: float
    loss: float
    half_width: float | None
    at_edge: bool


def cost_figure(points: Sequence[CostPoint]) -> Figure:
    """Draw the loss of each arm at its best value against the predicted communication of a private inference.

    Hollow: the best value is at the edge of the sweep. Bars: 95% intervals over seeds.
    """
    figure = new_figure(8.0, 4.4)
    axes = figure.subplots()
    tidy(axes)
    for index, point in enumerate(points):
        colour = _style(index)[0]
        face = "white" if point.at_edge else colour
        shape = "osD^v"[index // len(PALETTE) % 5]
        axes.errorbar(point.communication_gb, point.loss, point.half_width, fmt=shape, color=colour, capsize=3,
                      markersize=7, markerfacecolor=face, elinewidth=1.2)  # fmt: skip
    axes.margins(0.12, 0.15)
    _labels(axes, [point.name for point in points], [(point.communication_gb, point.loss) for point in points])
    axes.set(xlabel="communication of a private inference (GB), predicted", ylabel="validation loss (nats a token)")
    axes.set_title("each arm at its own best value", fontsize=10, color=INK)
    return figure
