"""Draw maps of heads [L, N]: layers down, heads across, a number in every cell that has room for one.

Layer 0 reads the embedding. Entropies are in nats, thresholds are fractions of ln T, NaN marks what was not measured.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from train.pictures.style import INK, MISSING, PALETTE, Array, new_figure, tidy, tidy_bar
from train.run.entropy_words import ceiling_nats

LARGEST_MAP_IN = (15.0, 12.0)  # width, height of the cells of one map, in inches
POINTS_PER_INCH = 72


def head_map_figure(entropy_nats: ArrayLike, seq_length: int, title: str = "") -> Figure:
    """Draw the mean entropy of every head, [L, N] in nats; colours run from 0 to the causal ceiling."""
    return head_maps_figure({title: entropy_nats}, [seq_length])


def head_maps_figure(maps: Mapping[str, ArrayLike], seq_lengths: Sequence[int]) -> Figure:
    """Draw head maps side by side on one colour scale, from 0 to the largest ceiling.

    Args:
        maps: title -> entropies [L, N] in nats; sizes may differ from run to run.
        seq_lengths: context T of each, in tokens.
    """
    arrays = [np.asarray(values, dtype=float) for values in maps.values()]
    columns = len(arrays) if len(arrays) < 4 else 2 + (len(arrays) > 4)
    rows = -(-len(arrays) // columns)
    cells = tuple(max(array.shape[axis] for array in arrays) for axis in (0, 1))
    width_in, height_in = _map_size_in(cells, columns, rows)
    title_in = 0.085 * max(len(line) for title in maps for line in title.split("\n"))
    width_in = max(width_in, title_in - 0.75)
    figure = new_figure(columns * (width_in + 0.75) + 1.1, rows * (height_in + 0.95))
    ceiling = max(ceiling_nats(length) for length in seq_lengths)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, title, array in zip(panels, maps, arrays, strict=False):
        image = _draw_map(axes, array, (0.0, ceiling), (width_in / array.shape[1], height_in / array.shape[0]))
        axes.set_title(title, fontsize=10, color=INK)
    for axes in panels[len(arrays) :]:
        axes.set_axis_off()
    bar = _colour_bar(figure, image, list(panels), "mean entropy (nats)", (columns * width_in, rows * height_in))
    marks = [mark for mark in MaxNLocator(4).tick_values(0, ceiling) if 0 <= mark < 0.92 * ceiling]
    bar.set_ticks([*marks, ceiling], labels=[*(f"{mark:g}" for mark in marks), f"{ceiling:.2f}"])
    bar.ax.set_title("ln(T!)/T", fontsize=8, color=INK, loc="left")
    return figure


def threshold_map_figure(threshold: ArrayLike, title: str = "") -> Figure:
    """Draw the learned thresholds [L, N] as fractions of ln T, and each layer's mean and variance over its heads."""
    values = np.asarray(threshold, dtype=float)
    layers, heads = values.shape
    width_in, height_in = _map_size_in((layers, heads))
    width_in = max(width_in, 0.085 * len(title) - 0.75)
    figure = new_figure(width_in + 5.2, height_in + 0.95)
    panels = figure.subplots(1, 3, width_ratios=[width_in, 1.5, 1.5], sharey=True)
    image = _draw_map(panels[0], values, _rounded_range(values), (width_in / heads, height_in / layers))
    panels[0].set_title(title, fontsize=10, color=INK)
    _colour_bar(figure, image, [panels[0]], "threshold θ (of ln T)", (width_in, height_in))
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    rows = np.arange(layers)
    panels[1].plot(values.mean(axis=1), rows, "o-", color=PALETTE[0], markersize=3.5, linewidth=1)
    panels[2].barh(rows, values.var(axis=1), height=0.6, color=PALETTE[0])
    for axes, name in zip(panels[1:], ("mean", "variance"), strict=True):
        tidy(axes)
        axes.set_title(f"{name} of θ\nover heads", fontsize=9, color=INK)
        axes.tick_params(labelleft=False, left=False, labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
        axes.xaxis.get_offset_text().set_fontsize(7)
    panels[1].set_xlim(image.get_clim())
    panels[2].set_xlim(0, max(np.nan_to_num(values.var(axis=1)).max() * 1.1, 1e-4))  # below that it is rounding
    return figure


def _map_size_in(cells: tuple[int, ...], columns: int = 1, rows: int = 1) -> tuple[float, float]:
    """Return width and height in inches of one map's cells: readable, while all maps fit on one page."""
    layers, heads = cells
    width_in = min(0.48 * heads, LARGEST_MAP_IN[0] / columns)
    height_in = min(0.32 * layers, LARGEST_MAP_IN[1] / rows)
    return max(width_in, 2.0), max(height_in, 1.5)


def _draw_map(axes: Axes, values: Array, colour_range: tuple[float, float], cell_in: tuple[float, float]) -> AxesImage:
    """Draw [L, N] with layer 0 on top and a number in each cell that has room for one."""
    colours: Colormap = colormaps["viridis"].with_extremes(bad=MISSING)
    low, high = colour_range
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=colours, vmin=low, vmax=max(high, low + 1e-6))
    layers, heads = values.shape
    axes.set_xticks(*_ticks(heads, cell_in[0]))
    axes.set_yticks(*_ticks(layers, cell_in[1]))
    axes.set_xlabel("head", fontsize=9, color=INK)
    axes.set_ylabel("layer", fontsize=9, color=INK)
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)
    decimals, font_size = _annotation_style(cell_in)
    if decimals is None:
        return image
    for (layer, head), value in np.ndenumerate(values):
        text = f"{value:.{decimals}f}" if np.isfinite(value) else "NaN"
        dark = np.isfinite(value) and value < low + 0.55 * (high - low)
        ink = "white" if dark else "black"
        note = axes.text(head, layer, text, ha="center", va="center", fontsize=font_size, color=ink)
        note.set_in_layout(False)  # inside its cell anyway; measuring thousands would take seconds
    return image


def _annotation_style(cell_in: tuple[float, float]) -> tuple[int | None, float]:
    """Return decimals and font size in points of a cell's number; None if not even one decimal fits."""
    for decimals, characters in ((2, 4.0), (1, 3.0)):
        width_limit = cell_in[0] * POINTS_PER_INCH * 0.86 / (characters * 0.58)  # a digit is 0.58 em wide on average
        font_size = min(8.0, width_limit, cell_in[1] * POINTS_PER_INCH * 0.62)
        if font_size >= 5.0:
            return decimals, font_size
    return None, 0.0


def _ticks(count: int, cell_in: float) -> tuple[NDArray[np.int_], list[str]]:
    """Return the indices to label: all if there is room, else every 2nd, 4th, 8th."""
    stride = 1
    while stride * cell_in < 0.17:
        stride *= 2
    places = np.arange(0, count, stride)
    return places, [str(place) for place in places]


def _rounded_range(values: Array) -> tuple[float, float]:
    """Return the range of the finite values, widened to whole tenths; never empty."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = math.floor(finite.min() * 10 + 1e-9) / 10, math.ceil(finite.max() * 10 - 1e-9) / 10
    return (low, high) if high > low else (low - 0.1, high + 0.1)


def _colour_bar(
    figure: Figure, image: AxesImage, axes: list[Axes], label: str, size_in: tuple[float, float]
) -> Colorbar:
    """Add a colour bar as high as the maps beside it, which take `size_in` (width, height) in inches."""
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.22 / size_in[0], aspect=size_in[1] / 0.18)
    return tidy_bar(bar, label)
