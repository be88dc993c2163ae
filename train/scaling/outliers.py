"""Find points far off the law of the others. A few of them can decide its exponents."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.scaling.law import DELTA, LossLaw, refit
from train.scaling.points import Array, Points

FAR = 6.0  # robust standard deviations
MOST_ROUNDS = 20
COEFFICIENTS = 5


@dataclass(frozen=True)
class Outliers:
    """How far each of P points lies from the law of those that are not outliers.

    Attributes:
        law: fitted to the points that are not far.
        spread: robust standard deviation of their residuals of ln L.
        deviations: [P], each point's residual of ln L over the spread; positive if its loss is above the law.
    """

    law: LossLaw
    spread: float
    deviations: Array

    @property
    def far(self) -> NDArray[np.bool_]:
        return np.abs(self.deviations) > FAR


def outliers(points: Points, law: LossLaw) -> Outliers:
    """Find outliers: start from the law of all points, and refit without the far ones until the same ones are far.

    The law of all points would not do: outliers bend it towards themselves, and so hide each other.

    Args:
        points: of one architecture.
        law: fitted to all of them.
    """
    far = np.zeros(len(points), dtype=bool)
    for _ in range(MOST_ROUNDS):
        residuals = np.log(points.losses / law.loss(points.parameters, points.tokens))
        spread = robust_spread(residuals[~far])
        found = Outliers(law, spread, residuals / spread)
        if (found.far == far).all() or (~found.far).sum() <= 2 * COEFFICIENTS:
            break
        far = found.far
        (law,) = refit(law, points.parameters, points.tokens, points.losses, (~far)[None])
    return found


def robust_spread(residuals: Array) -> float:
    """Return the robust standard deviation: 1.4826 times the median size of the residuals.

    The 5 smallest are left out, since a fit of 5 coefficients can pass through as many points. The result is at least
    Huber's delta, below which the fit treats all residuals as noise.
    """
    sizes = np.sort(np.abs(residuals))[COEFFICIENTS:]
    return max(DELTA, 1.4826 * float(np.median(sizes))) if len(sizes) else DELTA
