"""Test what a few paired runs can tell: numbers in, numbers out.

A pair is two runs of one seed, which saw the same batches in the same order. So the unit is the seed, and n below is
the number of seeds. Levels are two-sided unless a function says otherwise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.8
"""With which a test shall see what is there, where the number of seeds is planned."""
MOST_SEEDS = 10_000
CHI_POINTS = 4000
"""Quantiles that stand for the distribution of a deviation, where a power is integrated over it."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        value: the estimate.
        low: lower end of its interval.
        high: upper end of its interval.
        p: of a two-sided test against 0.
        deviation: standard deviation over seeds.
        n: number of seeds.
    """

    value: float
    low: float
    high: float
    p: float
    deviation: float
    n: int


def paired(differences: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return the mean of paired differences with Student's interval, and the p of the paired t-test.

    Args:
        differences: one a seed, at least two.
        level: of the interval.
    """
    n, mean, deviation = len(differences), float(np.mean(differences)), float(np.std(differences, ddof=1))
    error = deviation / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return Estimate(mean, mean - half, mean + half, _two_sided(mean, error, n - 1), deviation, n)


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """Return the p of the claim that the mean difference lies within ±margin.

    Two one-sided t-tests (Schuirmann, 1987); p is the larger of both.
    """
    n, mean = len(differences), float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    return max(_above(margin - mean, error, n - 1), _above(margin + mean, error, n - 1))


def difference_beyond_p(differences: Sequence[float], margin: float) -> float:
    """Return the one-sided p of the claim that the mean difference lies outside ±margin, on the side where it is."""
    n, mean = len(differences), float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    return _above(abs(mean) - margin, error, n - 1)


def _above(distance: float, error: float, freedom: int) -> float:
    """Return the p of a one-sided t-test that a distance is positive."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, freedom))


def _two_sided(distance: float, error: float, freedom: int) -> float:
    return 1.0 if distance == 0 else min(1.0, 2 * _above(abs(distance), error, freedom))


def sign_flip_p(differences: Sequence[int]) -> float:
    """Return the exact two-sided p that whole differences come from pairs whose two sides are exchangeable.

    Each seed's difference had the opposite sign with the same chance. p is the share of all 2^n choices of signs whose
    sum is at least as far from 0. For differences of -1, 0 and 1 this is McNemar's exact test.

    Args:
        differences: one a seed, say how many more of its runs diverged in the first arm than in the second.
    """
    reach = sum(map(abs, differences))
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for difference in differences:
        chances = (np.roll(chances, difference) + np.roll(chances, -difference)) / 2
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, chances[np.abs(sums) >= abs(sum(differences))].sum()))


def fisher_p(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Return the two-sided p of Fisher's exact test that two shares are equal; it takes no account of pairs.

    Args:
        first: (diverged, all) of the first arm.
        second: (diverged, all) of the second.
    """
    table = [[lost, total - lost] for lost, total in (first, second)]
    return float(stats.fisher_exact(table)[1])


def holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's step-down procedure, in the same order."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def paired_power(n: int, effect: float, deviation: float, alpha: float = ALPHA) -> float:
    """Return the chance that a paired t-test of n seeds finds an effect.

    Args:
        n: number of seeds, at least two.
        effect: true mean difference.
        deviation: standard deviation of the differences.
        alpha: of the test.
    """
    if deviation == 0:
        return 1.0 if effect else alpha
    limits, centre = _limits(n, alpha / 2), abs(effect) / deviation * math.sqrt(n)
    return float((stats.norm.sf(limits - centre) + stats.norm.cdf(-limits - centre)).mean())


def equivalence_power(n: int, difference: float, margin: float, deviation: float, alpha: float = ALPHA) -> float:
    """Return the chance that two one-sided t-tests of n seeds find equivalence.

    Args:
        n: number of seeds, at least two.
        difference: true mean difference.
        margin: within which the arms are equivalent.
        deviation: standard deviation of the differences.
        alpha: of each one-sided test.
    """
    if deviation == 0:
        return 1.0 if abs(difference) < margin else 0.0
    limits, error = _limits(n, alpha), deviation / math.sqrt(n)
    within = stats.norm.cdf((margin - difference) / error - limits) - stats.norm.cdf(
        limits - (margin + difference) / error
    )
    return float(np.maximum(within, 0.0).mean())


def _limits(n: int, alpha: float) -> NDArray[np.float64]:
    """Return how many true standard errors a mean must be from 0, for each deviation that n seeds may show.

    They are equally likely: a mean over them integrates over what the seeds' own deviation may be.
    """
    shares = (np.arange(CHI_POINTS) + 0.5) / CHI_POINTS
    return np.asarray(stats.t.isf(alpha, n - 1) * np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1)))


def seeds_for_effect(effect: float, deviation: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return how many seeds a paired t-test needs for an effect; None if it is more than MOST_SEEDS."""
    return _fewest(lambda n: paired_power(n, effect, deviation, alpha) >= power)


def seeds_for_equivalence(
    difference: float, margin: float, deviation: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Return how many seeds show equivalence within a margin; None if it is more than MOST_SEEDS, or never."""
    if abs(difference) >= margin:
        return None
    return _fewest(lambda n: equivalence_power(n, difference, margin, deviation, alpha) >= power)


def smallest_effect(n: int, deviation: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest effect that a paired t-test of n seeds finds with a chance of `power`."""
    if deviation == 0:
        return 0.0
    found = brentq(lambda effect: paired_power(n, effect, 1.0, alpha) - power, 0.0, 1e6)
    return float(found) * deviation


def _fewest(suffices: Callable[[int], bool]) -> int | None:
    """Return the least number of seeds from 2 to MOST_SEEDS that suffices; more seeds always suffice too."""
    if not suffices(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # low does not suffice, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high
