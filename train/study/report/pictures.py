"""Draw pictures of many runs: arrays in, figures out.

Axes of arrays: L layers, N heads, S steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from train.pictures.plots import CLASS_COLOURS
from train.pictures.style import INK, LINE_STYLES, MUTED, PALETTE, depth_bar, lines_by_depth, new_figure, tidy
from train.run.entropy_words import CLASSES, ceiling_nats, class_shares


def training_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]]) -> Figure:
    """Draw training cross-entropy and gradient norm of intervals against their last step.

    Args:
        runs: name -> (steps, mean cross-entropy in nats a token, largest gradient norm before clipping), each [S].
    """
    figure = new_figure(9.6, 5.6)
    losses, norms = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 1])
    for axes in (losses, norms):
        tidy(axes)
    for index, (name, (steps, loss, norm)) in enumerate(runs.items()):
        style = {"color": PALETTE[index % len(PALETTE)], "linewidth": 0.9,
                 "linestyle": LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]}  # fmt: skip
        losses.plot(np.asarray(steps), np.asarray(loss, dtype=float), label=name, **style)
        norms.plot(np.asarray(steps), np.asarray(norm, dtype=float), **style)
    losses.set_ylabel("cross-entropy (nats a token)")
    losses.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    norms.set(xlabel="optimizer step", ylabel="largest gradient norm", yscale="log")
    return figure


def layer_entropies_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike]], seq_lengths: Sequence[int]) -> Figure:
    """Draw each layer's mean entropy against step, one panel a run (Figures 5 and 8 of the paper).

    Args:
        runs: title -> (steps [S], mean entropies in nats [S, L]).
        seq_lengths: T of each run, in tokens.
    """
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = new_figure(4.0 * columns + 0.8, 2.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    layers = 1
    for axes, (title, (steps, entropy)), length in zip(panels, runs.items(), seq_lengths, strict=False):
        means_SL = np.asarray(entropy, dtype=float)
        layers = max(layers, means_SL.shape[1])
        axes.axhline(ceiling_nats(length), color=MUTED, linestyle="--", linewidth=0.8)
        lines_by_depth(axes, steps, means_SL)
        axes.set_ylim(0, 1.08 * ceiling_nats(length))
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_ylabel("mean entropy (nats)")
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    depth_bar(figure, list(panels[: len(runs)]), layers)
    return figure


def shares_figure(runs: Mapping[str, ArrayLike], seq_lengths: Sequence[int]) -> Figure:
    """Draw the shares of each run's heads that are collapsed, healthy and overloaded.

    Args:
        runs: name -> entropies [L, N] in nats; heads that are not finite are left out.
        seq_lengths: T of each run, in tokens.
    """
    figure = new_figure(max(6.0, 1.1 * len(runs) + 3.2), 3.9)
    axes = figure.subplots()
    tidy(axes)
    pairs = zip(runs.values(), seq_lengths, strict=True)
    shares = 100 * np.array([class_shares(np.asarray(heads, dtype=float), length) for heads, length in pairs])
    places = np.arange(len(runs))
    for index, (name, colour) in enumerate(zip(CLASSES, CLASS_COLOURS, strict=True)):
        bars = axes.bar(places + 0.2 * (index - 1.5), np.nan_to_num(shares[:, index]), 0.19, color=colour, label=name)
        axes.bar_label(bars, [f"{share:.0f}" for share in shares[:, index]], fontsize=7, color=INK)
    axes.set_xticks(places, list(runs), rotation=20, ha="right", fontsize=8)
    axes.set_ylabel("share of heads (%)")
    axes.set_ylim(0, 105)
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        title="entropy, of ln(T!)/T",
        title_fontsize=8,
    )
    return figure


def nan_counts_figure(runs: Mapping[str, Sequence[int]]) -> Figure:
    """Draw how many heads of each layer are NaN.

    Args:
        runs: name -> NaN heads of each layer in the last row, as the paper counts them.
    """
    figure = new_figure(7.2, 3.2)
    axes = figure.subplots()
    tidy(axes)
    width = 0.8 / len(runs)
    for index, (name, counts) in enumerate(runs.items()):
        axes.bar(np.arange(len(counts)) + width * index, counts, width, color=PALETTE[index % len(PALETTE)], label=name)
    axes.set(xlabel="layer", ylabel="NaN heads")
    axes.legend(frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class ParetoPoint:
    """A model: what its private inference communicates, and its perplexity; `published` if the paper says so."""

    name: str
    communication_gb: float
    perplexity: float
    published: bool = False


def pareto_figure(points: Sequence[ParetoPoint]) -> Figure:
    """Draw perplexity against communication. Filled: measured here. Hollow: published. Lines join the undominated."""
    figure = new_figure(9.6, 4.6)
    axes = figure.subplots()
    tidy(axes)
    named = set()
    names = list(dict.fromkeys(point.name for point in points))
    for point in points:
        index = names.index(point.name)
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(
            point.communication_gb,
            point.perplexity,
            marker="osD^v"[index // len(PALETTE) % 5],
            markersize=7,
            linestyle="none",
            color=colour,
            markerfacecolor="white" if point.published else colour,
            label=None if point.name in named else point.name,
        )
        named.add(point.name)
    for published in (False, True):
        front = undominated([point for point in points if point.published == published])
        if not front:
            continue
        axes.plot(
            [point.communication_gb for point in front],
            [point.perplexity for point in front],
            color=MUTED,
            linewidth=1,
            linestyle=LINE_STYLES[1 if published else 0],
            zorder=0,
            label="best for its cost, published (hollow)" if published else "best for its cost here",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set(xlabel="communication of a private inference (GB), predicted", ylabel="validation perplexity")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def undominated(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Return the points that no other point beats in both communication and perplexity, by rising communication."""
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.communication_gb, p.perplexity)):
        if not front or point.perplexity < front[-1].perplexity:
            front.append(point)
    return front
