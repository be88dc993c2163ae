"""The pictures of arXiv 2501.03489 as functions from arrays to figures: no files, no pyplot, no global state.

Arrays are numbered as the model is: layer 0 reads the embedding. Axes of arrays: L layers, N heads, S logging steps.
Entropies are in nats, thresholds are fractions of ln T, and NaN marks what a run could not measure.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

INK, MUTED, GRID, MISSING = "#222222", "#6b6b6b", "#e6e6e6", "#d9d9d9"
# Okabe and Ito's palette, told apart under every common colour blindness; yellow is left out, too faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
# Quarters of the largest head entropy, from the lowest: the two ends are the two failures, the middle two are healthy.
QUARTERS = ("collapsed: 0 to 1/4 of max", "healthy: 1/4 to 1/2", "healthy: 1/2 to 3/4", "overloaded: 3/4 to max")
QUARTER_COLOURS = ("#D55E00", "#56B4E9", "#0072B2", "#E69F00")

LARGEST_MAP_IN = (15.0, 12.0)  # width, height of the cells of one map, in inches
POINTS_PER_INCH = 72


def head_shares(entropy_nats: ArrayLike) -> Array:
    """Shares of heads whose entropy lies in each quarter of the largest observed head entropy.

    Args:
        entropy_nats: any shape, usually [L, N]; NaN heads are left out.

    Returns:
        [4], lowest quarter first, summing to 1 (all NaN where no head is finite). A head on an edge counts upwards;
        where every entropy is 0 all heads are collapsed. Source: arXiv 2501.03489, the discussion of entropic overload.
    """
    values = np.asarray(entropy_nats, dtype=float).ravel()
    values = values[np.isfinite(values)]
    if values.size == 0:
        return np.full(4, np.nan)
    largest = values.max()
    if largest <= 0:
        return np.array([1.0, 0.0, 0.0, 0.0])
    # Multiplied before divided, so that an edge met exactly in floating point is met exactly here.
    quarters = np.clip(np.floor(4 * values / largest), 0, 3).astype(int)
    return np.bincount(quarters, minlength=4) / values.size


def entropy_ceiling_nats(seq_length: int) -> float:
    """Largest mean entropy of a causal head, ln(T!)/T nats: query i attends to i positions and so reaches only ln i."""
    return math.lgamma(seq_length + 1) / seq_length


def head_map_figure(entropy_nats: ArrayLike, seq_length: int, title: str = "") -> Figure:
    """Mean entropy of every head, [L, N] in nats; colours run from 0 to the causal ceiling, so that maps compare."""
    return head_maps_figure({title: entropy_nats}, [seq_length])


def head_maps_figure(maps: Mapping[str, ArrayLike], seq_lengths: Sequence[int]) -> Figure:
    """Head maps side by side on one colour scale, up to the largest ceiling of all.

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
    figure = _new_figure(columns * (width_in + 0.75) + 1.1, rows * (height_in + 0.95))
    ceiling = max(entropy_ceiling_nats(length) for length in seq_lengths)
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
    """Learned thresholds theta, [L, N] as fractions of ln T, and each layer's mean and variance over its heads."""
    values = np.asarray(threshold, dtype=float)
    layers, heads = values.shape
    width_in, height_in = _map_size_in((layers, heads))
    width_in = max(width_in, 0.085 * len(title) - 0.75)
    figure = _new_figure(width_in + 5.2, height_in + 0.95)
    panels = figure.subplots(1, 3, width_ratios=[width_in, 1.5, 1.5], sharey=True)
    image = _draw_map(panels[0], values, _rounded_range(values), (width_in / heads, height_in / layers))
    panels[0].set_title(title, fontsize=10, color=INK)
    _colour_bar(figure, image, [panels[0]], "threshold θ (of ln T)", (width_in, height_in))
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    rows = np.arange(layers)
    panels[1].plot(values.mean(axis=1), rows, "o-", color=PALETTE[0], markersize=3.5, linewidth=1)
    panels[2].barh(rows, values.var(axis=1), height=0.6, color=PALETTE[0])
    for axes, name in zip(panels[1:], ("mean", "variance"), strict=True):
        _tidy(axes)
        axes.set_title(f"{name} of θ\nover heads", fontsize=9, color=INK)
        axes.tick_params(labelleft=False, left=False, labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
        axes.xaxis.get_offset_text().set_fontsize(7)
    panels[1].set_xlim(image.get_clim())
    panels[2].set_xlim(0, max(np.nan_to_num(values.var(axis=1)).max() * 1.1, 1e-4))  # below that it is rounding
    return figure


def layer_entropy_figure(steps: ArrayLike, entropy_nats: ArrayLike, seq_length: int, title: str = "") -> Figure:
    """Mean entropy of each layer against step, under the causal ceiling.

    Args:
        steps: [S], optimizer steps.
        entropy_nats: [S, L, N].
    """
    figure = _new_figure(7.2, 4.2)
    axes = figure.subplots()
    layer_means_SL = np.asarray(entropy_nats, dtype=float).mean(axis=2)
    ceiling = entropy_ceiling_nats(seq_length)
    axes.axhline(ceiling, color=MUTED, linestyle="--", linewidth=1)
    axes.annotate(
        f"largest possible, ln(T!)/T = {ceiling:.2f}",
        (0.995, ceiling),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )
    _lines_by_depth(axes, steps, layer_means_SL)
    axes.set_ylim(0, max(ceiling * 1.1, 1e-3))
    axes.set_ylabel("mean entropy of the layer's heads (nats)")
    axes.set_title(title, fontsize=10, color=INK)
    _depth_bar(figure, [axes], layer_means_SL.shape[1])
    return figure


def bins_figure(steps: ArrayLike, entropy_nats: ArrayLike, title: str = "") -> Figure:
    """Shares of heads in four quarters of the largest head entropy: over the run, and at its last step in percent.

    Args:
        steps: [S], optimizer steps.
        entropy_nats: [S, L, N]; the largest entropy is taken anew at each step.
    """
    x = np.asarray(steps, dtype=float)
    percent_S4 = 100 * np.array([head_shares(snapshot) for snapshot in np.asarray(entropy_nats, dtype=float)])
    figure = _new_figure(9.2, 3.8)
    over_time, last = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _tidy(over_time)
    if len(x) == 1:  # an area needs two ends
        x, percent_S4 = np.array([x[0] - 0.5, x[0] + 0.5]), percent_S4.repeat(2, axis=0)
    over_time.stackplot(x, percent_S4.T, colors=QUARTER_COLOURS, edgecolor="white", linewidth=0.4)
    over_time.set(xlim=(x[0], x[-1]), ylim=(0, 100), ylabel="share of heads (%)")
    _step_axis(over_time, np.asarray(steps))
    over_time.set_title(title, fontsize=10, color=INK)
    _tidy(last)
    last.grid(axis="y", visible=False)
    positions = range(4)
    bars = last.barh(positions, np.nan_to_num(percent_S4[-1]), color=QUARTER_COLOURS, height=0.6)
    last.bar_label(bars, [f"{share:.1f}%" for share in percent_S4[-1]], padding=3, fontsize=8, color=INK)
    last.set_yticks(positions, QUARTERS, fontsize=8)
    last.set(xlim=(0, 118), xticks=[0, 25, 50, 75, 100], xlabel="share of heads (%)")
    healthy = percent_S4[-1, 1:3].sum()
    outcome = f"{healthy:.0f}% in the middle two" if np.isfinite(healthy) else "no head is finite"
    last.set_title(f"last step: {outcome}", fontsize=10, color=INK)
    return figure


def scales_figure(
    steps: ArrayLike,
    panels: Mapping[str, ArrayLike],
    ranges: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str = "",
) -> Figure:
    """Learned scalars of each layer against step, a panel each.

    Args:
        steps: [S], optimizer steps.
        panels: axis label -> [S, L].
        ranges: axis label -> (least, greatest) over everything the layers' means hide, [S] each; drawn as a grey band.
    """
    figure = _new_figure(3.9 * len(panels) + 0.9, 3.6)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    layers = 1
    for axes, (label, values) in zip(drawn, panels.items(), strict=True):
        values_SL = np.asarray(values, dtype=float)
        layers = values_SL.shape[1]
        _lines_by_depth(axes, steps, values_SL)
        if label in ranges:
            least, greatest = (np.asarray(bound, dtype=float) for bound in ranges[label])
            axes.fill_between(np.asarray(steps), least, greatest, color=GRID, zorder=0, linewidth=0)
            values_SL = np.stack([least, greatest])
        finite = values_SL[np.isfinite(values_SL)]
        if finite.size and finite.min() > 0 and finite.max() > 8 * finite.min():
            axes.set_yscale("log")
        axes.set_title(label, fontsize=10, color=INK)
    figure.suptitle(title, fontsize=10, color=INK)
    _depth_bar(figure, list(drawn), layers)
    return figure


def loss_figure(
    train: Mapping[str, ArrayLike], validation: tuple[ArrayLike, ArrayLike] | None, title: str = ""
) -> Figure:
    """Cross-entropy of training and validation against step; the entropy loss below it where there is one.

    Args:
        train: step, ce_loss, entropy_loss; each [S], nats a token.
        validation: (steps, losses) of the evaluations, nats a token, or None.
    """
    steps, ce_loss, entropy_loss = (np.asarray(train[key], dtype=float) for key in ("step", "ce_loss", "entropy_loss"))
    regularized = bool(np.any(np.nan_to_num(entropy_loss) != 0))
    figure = _new_figure(7.2, 5.2 if regularized else 4.0)
    grid = figure.subplots(1 + regularized, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1][: 1 + regularized])[
        :, 0
    ]
    for axes in grid:
        _tidy(axes)
    _noisy_line(grid[0], steps, ce_loss, PALETTE[0], "train")
    if validation is not None:
        grid[0].plot(*validation, "o-", color=PALETTE[1], markersize=3.5, linewidth=1.2, label="validation", zorder=4)
    grid[0].set_ylabel("cross-entropy (nats a token)")
    grid[0].legend(frameon=False, fontsize=8)
    grid[0].set_title(title, fontsize=10, color=INK)
    if regularized:
        _noisy_line(grid[1], steps, entropy_loss, PALETTE[2], "entropy loss")
        grid[1].set_ylabel("entropy loss\n(nats a token)")
    _step_axis(grid[-1], steps)
    return figure


def validation_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str = "") -> Figure:
    """Validation loss of several runs against tokens, so that runs of other batch sizes compare.

    Args:
        runs: name -> (tokens, losses in nats a token), each [E].
    """
    figure = _new_figure(8.4, 4.2)
    axes = figure.subplots()
    _tidy(axes)
    millions = max(float(np.max(tokens)) for tokens, _ in runs.values()) / 1e6
    for index, (name, (tokens, losses)) in enumerate(runs.items()):
        axes.plot(
            np.asarray(tokens, dtype=float) / 1e6,
            np.asarray(losses, dtype=float),
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            color=PALETTE[index % len(PALETTE)],
            linestyle=LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)],
            label=f"{name},  {_perplexity(losses)}",
        )
    axes.set_xlim(0, millions * 1.03)
    axes.set(xlabel="training tokens (millions)", ylabel="validation loss (nats a token)")
    axes.set_title(title, fontsize=10, color=INK)
    axes.legend(
        frameon=False,
        fontsize=8,
        title="last perplexity",
        title_fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


def _new_figure(width_in: float, height_in: float) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # draws without a display
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, color=MUTED)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)


def _map_size_in(cells: tuple[int, ...], columns: int = 1, rows: int = 1) -> tuple[float, float]:
    """Width and height in inches of the cells of one map of several: readable cells while all fit on one page."""
    layers, heads = cells
    width_in = min(0.48 * heads, LARGEST_MAP_IN[0] / columns)
    height_in = min(0.32 * layers, LARGEST_MAP_IN[1] / rows)
    return max(width_in, 2.0), max(height_in, 1.5)


def _draw_map(axes: Axes, values: Array, colour_range: tuple[float, float], cell_in: tuple[float, float]) -> AxesImage:
    """Draws [L, N] with layer 0 on top and a number in each cell that is large enough to hold one."""
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
    """Decimals and font size in points of a cell's number: two decimals where they fit, else one, else no number."""
    for decimals, characters in ((2, 4.0), (1, 3.0)):
        width_limit = cell_in[0] * POINTS_PER_INCH * 0.86 / (characters * 0.58)  # a digit is 0.58 em wide on average
        font_size = min(8.0, width_limit, cell_in[1] * POINTS_PER_INCH * 0.62)
        if font_size >= 5.0:
            return decimals, font_size
    return None, 0.0


def _ticks(count: int, cell_in: float) -> tuple[NDArray[np.int_], list[str]]:
    """Every index where there is room, else every 2nd, 4th, 8th."""
    stride = 1
    while stride * cell_in < 0.17:
        stride *= 2
    places = np.arange(0, count, stride)
    return places, [str(place) for place in places]


def _rounded_range(values: Array) -> tuple[float, float]:
    """The range of the finite values, widened to whole tenths; never empty."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = math.floor(finite.min() * 10 + 1e-9) / 10, math.ceil(finite.max() * 10 - 1e-9) / 10
    return (low, high) if high > low else (low - 0.1, high + 0.1)


def _colour_bar(
    figure: Figure, image: AxesImage, axes: list[Axes], label: str, size_in: tuple[float, float]
) -> Colorbar:
    """A bar as high as the maps beside it, which take `size_in` (width, height) in inches."""
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.22 / size_in[0], aspect=size_in[1] / 0.18)
    return _tidy_bar(bar, label)


def _tidy_bar(bar: Colorbar, label: str) -> Colorbar:
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    bar.set_label(label, fontsize=9, color=INK)
    return bar


def _depth_colours(layers: int) -> ListedColormap:
    """One colour a layer, dark (near the embedding) to light; viridis without its end too pale on white."""
    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, layers)))


def _lines_by_depth(axes: Axes, steps: ArrayLike, values_SL: Array) -> None:
    _tidy(axes)
    x = np.asarray(steps, dtype=float)
    colours = _depth_colours(values_SL.shape[1])
    marker = "o" if len(x) < 3 else None  # a line through one point is invisible
    for layer, line in enumerate(values_SL.T):
        axes.plot(x, line, color=colours(layer), linewidth=1.3, marker=marker, markersize=3)
    _step_axis(axes, x)


def _step_axis(axes: Axes, steps: Array) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(steps) == 1:  # a range of no width would be cut into fractions of a step
        axes.set_xticks(steps)


def _depth_bar(figure: Figure, axes: list[Axes], layers: int) -> None:
    """Says which colour is which layer; a bar serves 2 layers as well as 48, where a legend would not."""
    edges = np.arange(layers + 1) - 0.5
    scale = ScalarMappable(BoundaryNorm(edges, layers), _depth_colours(layers))
    stride = -(-layers // 12)
    bar = figure.colorbar(scale, ax=axes, pad=0.015, fraction=0.05, aspect=28, ticks=np.arange(0, layers, stride))
    bar.ax.invert_yaxis()  # layer 0 on top, as in the maps
    _tidy_bar(bar, "layer")


def _noisy_line(axes: Axes, steps: Array, values: Array, colour: str, label: str) -> None:
    """A line of single-step values; long ones faint, with their running mean over a fiftieth of the run in front."""
    window = len(values) // 50
    if window < 3:
        axes.plot(steps, values, color=colour, linewidth=1.3, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    middles = steps[window // 2 :][: len(smooth)]  # centred, so that the line does not lag behind a steep start
    axes.plot(middles, smooth, color=colour, linewidth=1.5, label=f"{label} (mean of {window} steps)")


def _perplexity(losses: ArrayLike) -> str:
    last = float(np.asarray(losses, dtype=float)[-1])
    return f"{math.exp(last):.2f}" if last < 100 else "none (the loss is not finite)"
