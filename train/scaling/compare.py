"""Compare two architectures: find where their losses cross in parameters, tokens, compute and communication."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.scaling.analysis import FlopsPerToken, compute_optimal
from train.scaling.law import LossLaw

Array = NDArray[np.float64]
Quantity = Callable[[LossLaw, LossLaw], Array]
"""Loss of the second minus loss of the first over a grid."""

GRID_POINTS = 241


@dataclass(frozen=True)
class Curve:
    """An architecture: its law, and what a model of N parameters costs.

    Attributes:
        resamples: laws of the bootstrap; may be empty.
        flops_per_token: training FLOPs a token at N parameters.
        communication_gb: of a private inference at N parameters; None if unknown.
    """

    name: str
    law: LossLaw
    resamples: list[LossLaw]
    flops_per_token: FlopsPerToken
    communication_gb: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Crossing:
    """Where the better one of two architectures changes along an axis.

    Attributes:
        axis: in words.
        range: of the axis that was searched.
        at: values of the axis at which the losses are equal; empty if one is better throughout.
        below: name of the one that is better below the first crossing, or throughout.
        interval: 95% interval of the first crossing over resamples; None if no resample crosses.
        share: share of resamples that cross within the range; NaN without resamples.
    """

    axis: str
    range: tuple[float, float]
    at: list[float]
    below: str
    interval: tuple[float, float] | None
    share: float


def crossings(first: Curve, second: Curve, axis: str, grid: Array, difference: Quantity) -> Crossing:
    """Find where `difference` is zero over a grid, for the two laws and for pairs of their resamples.

    Args:
        first: the architecture that is better where the difference is positive.
        second: the other.
        axis: name of the grid's quantity.
        grid: increasing, positive.
        difference: loss of the second minus that of the first over the grid, given their laws.
    """
    at, first_is_better = _zeros(grid, difference(first.law, second.law))
    firsts = []
    pairs = list(zip(first.resamples, second.resamples, strict=False))
    for one, other in pairs:
        found, _ = _zeros(grid, difference(one, other))
        firsts.extend(found[:1])
    interval = None
    if firsts:
        low, high = np.percentile(firsts, (2.5, 97.5))
        interval = (float(low), float(high))
    share = len(firsts) / len(pairs) if pairs else float("nan")
    below = first.name if first_is_better else second.name
    return Crossing(axis, (float(grid[0]), float(grid[-1])), at, below, interval, share)


def compare(
    first: Curve,
    second: Curve,
    parameters: tuple[float, float],
    tokens: tuple[float, float],
    flops: tuple[float, float],
    at: tuple[float, float],
) -> list[Crossing]:
    """Find where the losses of two architectures cross, along each axis.

    The axes are N at a fixed D, D at a fixed N, compute with each model at its optimal size, and communication at a
    fixed D.

    Args:
        first: an architecture.
        second: another.
        parameters: range of N to search; crossings beyond the measured range are extrapolations.
        tokens: range of D to search.
        flops: range of compute to search.
        at: the N and D that are held fixed along the other axes.
    """
    at_parameters, at_tokens = at
    sizes, lengths, budgets = (np.geomspace(*ends, GRID_POINTS) for ends in (parameters, tokens, flops))
    found = [
        crossings(
            first,
            second,
            f"parameters at {at_tokens:.3g} tokens",
            sizes,
            lambda one, other: other.loss(sizes, at_tokens) - one.loss(sizes, at_tokens),
        ),
        crossings(
            first,
            second,
            f"tokens at {at_parameters:.3g} parameters",
            lengths,
            lambda one, other: other.loss(at_parameters, lengths) - one.loss(at_parameters, lengths),
        ),
        crossings(
            first,
            second,
            "training FLOPs, each at its optimal size",
            budgets,
            lambda one, other: (
                compute_optimal(other, budgets, second.flops_per_token, 301).losses
                - compute_optimal(one, budgets, first.flops_per_token, 301).losses
            ),
        ),
    ]
    if first.communication_gb is None or second.communication_gb is None:
        return found
    ends = [curve.communication_gb(np.array(parameters)) for curve in (first, second) if curve.communication_gb]
    gigabytes = np.geomspace(min(e[0] for e in ends), max(e[1] for e in ends), GRID_POINTS)
    inverse = [size_at(curve, gigabytes, sizes) for curve in (first, second)]
    found.append(
        crossings(
            first,
            second,
            f"communication (GB) at {at_tokens:.3g} tokens",
            gigabytes,
            lambda one, other: other.loss(inverse[1], at_tokens) - one.loss(inverse[0], at_tokens),
        )
    )
    return found


def size_at(curve: Curve, gigabytes: Array, sizes: Array) -> Array:
    """Return the parameters that budgets of communication pay for; NaN outside the range of `sizes`."""
    assert curve.communication_gb is not None
    costs = curve.communication_gb(sizes)
    return np.exp(np.interp(np.log(gigabytes), np.log(costs), np.log(sizes), left=np.nan, right=np.nan))


def _zeros(grid: Array, difference: Array) -> tuple[list[float], bool]:
    """Return the zeros, interpolated in the grid's logarithm, and whether the difference starts out positive."""
    known = np.isfinite(difference)
    x, y = np.log(grid[known]), difference[known]
    if not len(y):
        return [], False
    signs = np.sign(y)
    places = np.flatnonzero(signs[:-1] * signs[1:] < 0)
    zeros = x[places] - y[places] * (x[places + 1] - x[places]) / (y[places + 1] - y[places])
    return [float(value) for value in np.exp(zeros)], bool(y[0] > 0)


def along_ladder(sizes: Array, values: Array) -> Callable[[Array], Array]:
    """Interpolate a cost of a model of N parameters between the ladder's own models, linearly in logarithms.

    Beyond the ends, the line through the last two models goes on. One model alone gives a cost proportional to N.

    Args:
        sizes: N of each model.
        values: its cost.
    """
    order = np.argsort(sizes)
    x, y = np.log(np.asarray(sizes, dtype=float)[order]), np.log(np.asarray(values, dtype=float)[order])

    def cost(parameters: Array) -> Array:
        at = np.log(np.asarray(parameters, dtype=float))
        if len(x) == 1:
            return np.asarray(np.exp(y[0] + at - x[0]))
        inside = np.interp(at, x, y)
        low = y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0])
        high = y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])
        return np.asarray(np.exp(np.where(at < x[0], low, np.where(at > x[-1], high, inside))))

    return cost
