"""Compute what follows from a law: compute-optimal allocation, isoFLOP parabolas, error on held-out runs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.scaling.law import Fit, FitError, LossLaw, fit
from train.scaling.points import Points

Array = NDArray[np.float64]
FlopsPerToken = Callable[[Array], Array]
"""Training FLOPs a token of a model of N parameters."""

SEARCHED = (1e4, 1e14)  # parameters; the range in which an optimum is searched
SAME_COMPUTE = 0.15  # points whose ln C differ by less belong to one isoFLOP curve
FEWEST_SIZES = 4  # of an isoFLOP curve; three would always lie on a parabola


def six_flops_per_parameter(parameters: Array) -> Array:
    """Estimate training FLOPs a token by the usual rule, C = 6 N D."""
    return 6 * np.asarray(parameters, dtype=float)


@dataclass(frozen=True)
class Allocation:
    """The best size and length of a run for each compute budget; arrays over budgets."""

    flops: Array
    parameters: Array
    tokens: Array
    losses: Array


def compute_optimal(
    law: LossLaw, flops: ArrayLike, flops_per_token: FlopsPerToken = six_flops_per_parameter, grid_points: int = 2001
) -> Allocation:
    """Find the size with the lowest loss for each compute budget.

    Args:
        law: of the architecture.
        flops: budgets of training FLOPs.
        flops_per_token: training FLOPs a token at N parameters; any function.
        grid_points: sizes tried over SEARCHED; a parabola through the best three refines the optimum.
    """
    budgets = np.atleast_1d(np.asarray(flops, dtype=float))
    sizes = np.geomspace(*SEARCHED, grid_points)
    tokens = budgets[:, None] / flops_per_token(sizes)[None]
    losses = law.loss(sizes[None], tokens)
    best = np.clip(losses.argmin(axis=1), 1, grid_points - 2)
    left, middle, right = (losses[np.arange(len(budgets)), best + shift] for shift in (-1, 0, 1))
    curvature = np.maximum(left - 2 * middle + right, 1e-300)
    shift = np.clip(0.5 * (left - right) / curvature, -1, 1)  # vertex of the parabola through the three, in grid steps
    parameters = sizes[best] * (sizes[1] / sizes[0]) ** shift
    lengths = budgets / flops_per_token(parameters)
    return Allocation(budgets, parameters, lengths, law.loss(parameters, lengths))


def exponents(law: LossLaw) -> tuple[float, float]:
    """Return a and b of N_opt ~ C^a and D_opt ~ C^b, for C proportional to N D."""
    total = law.alpha + law.beta
    return law.beta / total, law.alpha / total


@dataclass(frozen=True)
class IsoFlop:
    """Runs of about the same compute, and the parabola of their loss in ln N."""

    flops: float
    parameters: Array
    losses: Array
    coefficients: Array  # of ln N, highest power first
    best_parameters: float

    @property
    def best_loss(self) -> float:
        return float(np.polyval(self.coefficients, np.log(self.best_parameters)))


def isoflops(points: Points) -> list[IsoFlop]:
    """Fit a parabola of the loss in ln N to the runs of each compute budget.

    Runs are grouped by compute. If too few coincide, each size's losses are interpolated (ln loss in ln C) at budgets
    that most sizes bracket. Only parabolas that open upwards, with their minimum among the sizes run, are returned.
    """
    groups = _grouped(points) or _interpolated(points)
    curves = []
    for flops, parameters, losses in groups:
        log_sizes = np.log(parameters)
        coefficients = np.polyfit(log_sizes, losses, 2)
        if coefficients[0] <= 0:
            continue
        vertex = -coefficients[1] / (2 * coefficients[0])
        if log_sizes.min() <= vertex <= log_sizes.max():
            curves.append(IsoFlop(flops, parameters, losses, coefficients, float(np.exp(vertex))))
    return curves


def _grouped(points: Points) -> list[tuple[float, Array, Array]]:
    order = np.argsort(points.flops)
    logs = np.log(points.flops[order])
    groups = []
    for members in np.split(order, np.flatnonzero(np.diff(logs) > SAME_COMPUTE / 4) + 1):
        spread = np.ptp(np.log(points.flops[members]))
        if len(set(points.parameters[members])) >= FEWEST_SIZES and spread <= SAME_COMPUTE:
            compute = float(np.exp(np.log(points.flops[members]).mean()))
            groups.append((compute, points.parameters[members], points.losses[members]))
    return groups


def _interpolated(points: Points, budgets: int = 6) -> list[tuple[float, Array, Array]]:
    curves = []
    for size in sorted(set(points.parameters)):
        members = np.flatnonzero(points.parameters == size)
        members = members[np.argsort(points.flops[members])]
        if len(members) >= 2:
            curves.append((size, np.log(points.flops[members]), np.log(points.losses[members])))
    if len(curves) < FEWEST_SIZES:
        return []
    groups = []
    for level in np.linspace(min(c[0] for _, c, _ in curves), max(c[-1] for _, c, _ in curves), budgets + 2)[1:-1]:
        reached = [(size, np.interp(level, c, y)) for size, c, y in curves if c[0] <= level <= c[-1]]
        if len(reached) >= FEWEST_SIZES:
            sizes, logs = np.array(reached).T
            groups.append((float(np.exp(level)), sizes, np.exp(logs)))
    return groups


def power_law(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Fit y = factor * x^exponent by least squares of logarithms; return exponent and factor."""
    exponent, log_factor = np.polyfit(np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float)), 1)
    return float(exponent), float(np.exp(log_factor))


@dataclass(frozen=True)
class HeldOut:
    """How well a law fitted to the cheaper runs predicts the dearest; `predicted` is parallel to `points`."""

    fit: Fit
    points: Points
    predicted: Array

    @property
    def relative_errors(self) -> Array:
        return self.predicted / self.points.losses - 1


def held_out(points: Points, share: float = 0.2) -> HeldOut | None:
    """Predict the share of runs with the most compute from the others; return None if too few remain to fit."""
    count = max(1, round(share * len(points)))
    dearest = np.zeros(len(points), dtype=bool)
    dearest[np.argsort(points.flops, kind="stable")[-count:]] = True
    cheaper, held = points.where(~dearest), points.where(dearest)
    try:
        found = fit(cheaper.parameters, cheaper.tokens, cheaper.losses)
    except FitError:
        return None
    return HeldOut(found, held, found.law.loss(held.parameters, held.tokens))
