"""Define how every picture looks: colours, axes, figures without pyplot or a display, lines coloured by depth."""

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

INK, MUTED, GRID, MISSING = "#222222", "#6b6b6b", "#e6e6e6", "#d9d9d9"
# Okabe and Ito's palette, which readers with any common colour blindness can tell apart; without yellow, too faint.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")


def new_figure(width_in: float, height_in: float) -> Figure:
    """Make a figure that draws without a display; sizes are in inches."""
    figure = Figure(figsize=(width_in, height_in), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Give axes the style of all pictures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, color=MUTED)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)


def tidy_bar(bar: Colorbar, label: str) -> Colorbar:
    """Give a colour bar the style of all pictures."""
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    bar.set_label(label, fontsize=9, color=INK)
    return bar


def depth_colours(layers: int) -> ListedColormap:
    """Return one colour a layer, from dark near the embedding to light; viridis without its end, too pale on white."""
    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, layers)))


def lines_by_depth(axes: Axes, steps: ArrayLike, values_SL: Array) -> None:
    """Draw a line for each layer against step, coloured by depth."""
    tidy(axes)
    x = np.asarray(steps, dtype=float)
    colours = depth_colours(values_SL.shape[1])
    marker = "o" if len(x) < 3 else None  # a line through one point is invisible
    for layer, line in enumerate(values_SL.T):
        axes.plot(x, line, color=colours(layer), linewidth=1.3, marker=marker, markersize=3)
    step_axis(axes, x)


def step_axis(axes: Axes, steps: Array) -> None:
    """Label the x axis with optimizer steps, all of them whole numbers."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(steps) == 1:  # a range of no width would be cut into fractions of a step
        axes.set_xticks(steps)


def depth_bar(figure: Figure, axes: list[Axes], layers: int) -> None:
    """Add a bar that says which colour is which layer; a legend would not hold 48 layers."""
    edges = np.arange(layers + 1) - 0.5
    scale = ScalarMappable(BoundaryNorm(edges, layers), depth_colours(layers))
    stride = -(-layers // 12)
    bar = figure.colorbar(scale, ax=axes, pad=0.015, fraction=0.05, aspect=28, ticks=np.arange(0, layers, stride))
    bar.ax.invert_yaxis()  # layer 0 on top, as in the maps
    tidy_bar(bar, "layer")


def noisy_line(axes: Axes, steps: Array, values: Array, colour: str, label: str) -> None:
    """Draw values of single steps. In a long run they are faint, behind their running mean over a fiftieth of it."""
    window = len(values) // 50
    if window < 3:
        axes.plot(steps, values, color=colour, linewidth=1.3, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    middles = steps[window // 2 :][: len(smooth)]  # centred, so that the mean does not lag behind a steep start
    axes.plot(middles, smooth, color=colour, linewidth=1.5, label=f"{label} (mean of {window} steps)")
