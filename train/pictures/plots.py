"""Draw the curves of arXiv 2501.03489: arrays in, figures out; no files, no pyplot, no global state.

Axes of arrays: L layers, N heads, S logging steps. Entropies are in nats, and NaN marks what a run could not measure.
"""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from train.pictures.style import (
    GRID,
    INK,
    LINE_STYLES,
    MUTED,
    PALETTE,
    Array,
    depth_bar,
    lines_by_depth,
    new_figure,
    noisy_line,
    step_axis,
    tidy,
)
from train.run.entropy_words import CLASSES, ceiling_nats, class_shares

CLASS_COLOURS = ("#D55E00", "#56B4E9", "#0072B2", "#E69F00")


def layer_entropy_figure(steps: ArrayLike, entropy_nats: ArrayLike, seq_length: int, title: str = "") -> Figure:
    """Draw the mean entropy of each layer against step, under the causal ceiling.

    Args:
        steps: [S], optimizer steps.
        entropy_nats: [S, L, N].
    """
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    layer_means_SL = np.asarray(entropy_nats, dtype=float).mean(axis=2)
    ceiling = ceiling_nats(seq_length)
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
    lines_by_depth(axes, steps, layer_means_SL)
    axes.set_ylim(0, max(ceiling * 1.1, 1e-3))
    axes.set_ylabel("mean entropy of the layer's heads (nats)")
    axes.set_title(title, fontsize=10, color=INK)
    depth_bar(figure, [axes], layer_means_SL.shape[1])
    return figure


def shares_figure(steps: ArrayLike, entropy_nats: ArrayLike, seq_length: int, title: str = "") -> Figure:
    """Draw the shares of heads that are collapsed, healthy and overloaded, over the run and at its last step.

    Args:
        steps: [S], optimizer steps.
        entropy_nats: [S, L, N]; heads that are not finite are left out.
    """
    x = np.asarray(steps, dtype=float)
    percent_S4 = 100 * np.array([class_shares(snapshot, seq_length) for snapshot in np.asarray(entropy_nats)])
    figure = new_figure(9.2, 3.8)
    over_time, last = figure.subplots(1, 2, width_ratios=[1.5, 1])
    tidy(over_time)
    if len(x) == 1:  # an area needs two ends
        x, percent_S4 = np.array([x[0] - 0.5, x[0] + 0.5]), percent_S4.repeat(2, axis=0)
    over_time.stackplot(x, percent_S4.T, colors=CLASS_COLOURS, edgecolor="white", linewidth=0.4)
    over_time.set(xlim=(x[0], x[-1]), ylim=(0, 100), ylabel="share of heads (%)")
    step_axis(over_time, np.asarray(steps))
    over_time.set_title(title, fontsize=10, color=INK)
    healthy = _draw_classes(last, percent_S4[-1], seq_length)
    last.set_title(f"last step: {healthy}", fontsize=10, color=INK)
    return figure


def classes_figure(entropy_nats: ArrayLike, seq_length: int, title: str = "") -> Figure:
    """Draw the shares of one model's heads that are collapsed, healthy and overloaded.

    Args:
        entropy_nats: [L, N]; heads that are not finite are left out.
    """
    figure = new_figure(5.2, 3.4)
    axes = figure.subplots()
    healthy = _draw_classes(axes, 100 * np.array(class_shares(np.asarray(entropy_nats), seq_length)), seq_length)
    axes.set_title(f"{title}: {healthy}", fontsize=10, color=INK)
    return figure


def _draw_classes(axes: Axes, percent_4: Array, seq_length: int) -> str:
    """Draw a bar for each class of heads; return how many are healthy, in words."""
    tidy(axes)
    axes.grid(axis="y", visible=False)
    positions = range(len(CLASSES))
    bars = axes.barh(positions, np.nan_to_num(percent_4), color=CLASS_COLOURS, height=0.6)
    axes.bar_label(bars, [f"{share:.1f}%" for share in percent_4], padding=3, fontsize=8, color=INK)
    axes.set_yticks(positions, CLASSES, fontsize=8)
    axes.set_ylabel(f"mean entropy of a head,\nof ln(T!)/T = {ceiling_nats(seq_length):.2f} nats")
    axes.set(xlim=(0, 118), xticks=[0, 25, 50, 75, 100], xlabel="share of heads (%)")
    healthy = percent_4[1:3].sum()
    return f"{healthy:.0f}% healthy" if np.isfinite(healthy) else "no head is finite"


def scales_figure(
    steps: ArrayLike,
    panels: Mapping[str, ArrayLike],
    ranges: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str = "",
) -> Figure:
    """Draw the learned scalars of each layer against step, one panel a kind.

    Args:
        steps: [S], optimizer steps.
        panels: axis label -> [S, L].
        ranges: axis label -> (least, greatest), [S] each, over all that the means hide; drawn as a grey band.
    """
    figure = new_figure(3.9 * len(panels) + 0.9, 3.6)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    layers = 1
    for axes, (label, values) in zip(drawn, panels.items(), strict=True):
        values_SL = np.asarray(values, dtype=float)
        layers = values_SL.shape[1]
        lines_by_depth(axes, steps, values_SL)
        if label in ranges:
            least, greatest = (np.asarray(bound, dtype=float) for bound in ranges[label])
            axes.fill_between(np.asarray(steps), least, greatest, color=GRID, zorder=0, linewidth=0)
            values_SL = np.stack([least, greatest])
        finite = values_SL[np.isfinite(values_SL)]
        if finite.size and finite.min() > 0 and finite.max() > 8 * finite.min():
            axes.set_yscale("log")
        axes.set_title(label, fontsize=10, color=INK)
    figure.suptitle(title, fontsize=10, color=INK)
    depth_bar(figure, list(drawn), layers)
    return figure


def loss_figure(
    train: Mapping[str, ArrayLike], validation: tuple[ArrayLike, ArrayLike] | None, title: str = ""
) -> Figure:
    """Draw cross-entropy of training and validation against step; below it the entropy loss, if there is one.

    Args:
        train: step, ce_loss, entropy_loss; each [S], nats a token.
        validation: (steps, losses) of the evaluations, nats a token, or None.
    """
    steps, ce_loss, entropy_loss = (np.asarray(train[key], dtype=float) for key in ("step", "ce_loss", "entropy_loss"))
    regularized = bool(np.any(np.nan_to_num(entropy_loss) != 0))
    figure = new_figure(7.2, 5.2 if regularized else 4.0)
    grid = figure.subplots(1 + regularized, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1][: 1 + regularized])[
        :, 0
    ]
    for axes in grid:
        tidy(axes)
    noisy_line(grid[0], steps, ce_loss, PALETTE[0], "train")
    if validation is not None:
        grid[0].plot(*validation, "o-", color=PALETTE[1], markersize=3.5, linewidth=1.2, label="validation", zorder=4)
    grid[0].set_ylabel("cross-entropy (nats a token)")
    grid[0].legend(frameon=False, fontsize=8)
    grid[0].set_title(title, fontsize=10, color=INK)
    if regularized:
        noisy_line(grid[1], steps, entropy_loss, PALETTE[2], "entropy loss")
        grid[1].set_ylabel("entropy loss\n(nats a token)")
    step_axis(grid[-1], steps)
    return figure


def validation_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str = "") -> Figure:
    """Draw validation losses against tokens, so that runs of different batch sizes compare.

    Args:
        runs: name -> (tokens, losses in nats a token), each [E].
    """
    figure = new_figure(8.4, 4.2)
    axes = figure.subplots()
    tidy(axes)
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


def _perplexity(losses: ArrayLike) -> str:
    last = float(np.asarray(losses, dtype=float)[-1])
    return f"{math.exp(last):.2f}" if last < 100 else "none (the loss is not finite)"
