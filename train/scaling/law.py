"""Fit the law L(N, D) = E + A / N^alpha + B / D^beta to measured losses; N counts parameters, D tokens.

The fit is that of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3). It minimizes Huber's loss of the residuals of
ln L over (ln A, ln B, ln E, alpha, beta), from a grid of starts. All starts move at once, as one batch of damped
Gauss-Newton steps on reweighted least squares. BFGS then polishes the best few.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

DELTA = 1e-3  # of Huber's loss, in ln L
GRID = {  # starts, as in the paper; their product is 4,500
    "ln A": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "ln B": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "ln E": (-1.0, -0.5, 0.0, 0.5, 1.0),
    "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
    "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
}
SIEVE = ((12, 600), (30, 40), (300, 40))  # (steps, starts kept after them): most starts fall behind early
CHUNK = 250  # starts that move together; their arrays stay in the processor's cache
PATIENCE = 8  # steps without progress after which a start rests


@dataclass(frozen=True)
class LossLaw:
    """The coefficients of one architecture."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """Return the loss in the unit of the fitted losses; shapes broadcast."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    def as_row(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Fit:
    """A law, and how it was found.

    Attributes:
        objective: sum of Huber losses of the residuals of ln L.
        starts: number of starts.
        agreeing: how many of the polished starts ended within 1% of the best objective.
    """

    law: LossLaw
    objective: float
    starts: int
    agreeing: int


class FitError(ValueError):
    """The points do not determine a law; the message is one line."""


def fit(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, delta: float = DELTA) -> Fit:
    """Fit the law to P points.

    Args:
        parameters: N, [P].
        tokens: D, [P].
        losses: [P].
        delta: of Huber's loss, in ln L.

    Raises:
        FitError: there are fewer than 5 points, only one N or one D, or a value that is not positive and finite.
    """
    n, d, y = _checked(parameters, tokens, losses)
    starts = np.array(list(itertools.product(*GRID.values())))
    thetas = starts
    for steps, kept in SIEVE:
        thetas, values = _descend(thetas, n, d, y, np.ones((len(thetas), len(y))), delta, steps)
        thetas = thetas[np.argsort(values)[:kept]]
    polished = [_polish(theta, n, d, y, delta) for theta in thetas]
    best_value, best = min(polished, key=lambda pair: pair[0])
    agreeing = sum(value <= 1.01 * best_value + 1e-12 for value, _ in polished)
    return Fit(_law(best), best_value, len(starts), agreeing)


def refit(
    law: LossLaw, parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, counts: ArrayLike, delta: float = DELTA
) -> list[LossLaw]:
    """Fit R reweighted copies of the points at once, starting from a law near them.

    Args:
        law: fitted to the points.
        parameters: N, [P].
        tokens: D, [P].
        losses: [P].
        counts: [R, P], how often each copy contains each point.
        delta: of Huber's loss, in ln L.
    """
    n, d, y = _checked(parameters, tokens, losses)
    weights = np.asarray(counts, dtype=float)
    starts = np.repeat(_theta(law)[None], len(weights), axis=0)
    thetas, _ = _descend(starts, n, d, y, weights, delta, SIEVE[-1][0])
    return [_law(theta) for theta in thetas]


def bootstrap(
    law: LossLaw,
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    resamples: int = 1000,
    seed: int = 1,
    delta: float = DELTA,
) -> list[LossLaw]:
    """Fit the law to `resamples` draws of the points with replacement; arguments as in `refit`."""
    points = len(np.asarray(losses))
    counts = np.random.default_rng(seed).multinomial(points, np.full(points, 1 / points), size=resamples)
    return refit(law, parameters, tokens, losses, counts, delta)


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the central share `level` of the values; NaN is left out."""
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(np.asarray(values, dtype=float), (tail, 100 - tail))
    return float(low), float(high)


def _checked(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> tuple[Array, Array, Array]:
    """Return ln N, ln D, ln L."""
    n, d, y = (np.asarray(values, dtype=float).ravel() for values in (parameters, tokens, losses))
    if not len(n) == len(d) == len(y):
        raise FitError(f"{len(n)} parameter counts, {len(d)} token counts and {len(y)} losses: one of each is needed")
    if not all(np.all(np.isfinite(values) & (values > 0)) for values in (n, d, y)):
        raise FitError("parameters, tokens and losses must be positive and finite; leave out runs that diverged")
    if len(y) < 5 or len(set(n)) < 2 or len(set(d)) < 2:
        raise FitError(
            f"{len(y)} points with {len(set(n))} sizes and {len(set(d))} token counts do not determine 5 coefficients; "
            "train at least 5, over at least 2 sizes and 2 token counts"
        )
    return np.log(n), np.log(d), np.log(y)


def _theta(law: LossLaw) -> Array:
    terms = np.maximum([law.A, law.B, law.E], np.finfo(float).tiny)  # a fit may make one of them 0
    return np.array([*np.log(terms), law.alpha, law.beta])


def _law(theta: Array) -> LossLaw:
    a, b, e, alpha, beta = (float(value) for value in theta)
    return LossLaw(E=float(np.exp(e)), A=float(np.exp(a)), alpha=alpha, B=float(np.exp(b)), beta=beta)


def _residuals(theta_S5: Array, n: Array, d: Array, y: Array) -> tuple[Array, Array]:
    """Return residuals [S, P] of ln L, and the shares [S, 3, P] of the law's terms, which give its gradients."""
    a, b, e, alpha, beta = (theta_S5[:, index, None] for index in range(5))
    terms = np.stack([a - alpha * n, b - beta * d, np.broadcast_to(e, (len(theta_S5), len(n)))], axis=1)
    top = terms.max(axis=1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=1, keepdims=True)
    return (top + np.log(total))[:, 0] - y, shares / total


def _jacobian(shares: Array, n: Array, d: Array) -> Array:
    """Return the derivatives [S, 5, P] of the residuals."""
    first, second, third = shares[:, 0], shares[:, 1], shares[:, 2]
    return np.stack([first, second, third, -first * n, -second * d], axis=1)


def _huber(residuals: Array, delta: float) -> Array:
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _descend(
    theta: Array, n: Array, d: Array, y: Array, weights: Array, delta: float, steps: int
) -> tuple[Array, Array]:
    """Minimize Huber's loss by Levenberg-Marquardt, each row of theta [S, 5] by itself.

    At each point, Huber's loss is a square with weight min(1, delta / |r|). So each step solves a weighted least
    squares problem. Only the rows that it improves take the step. Returns thetas and objectives [S].
    """
    found = [
        _descend_chunk(theta[start : start + CHUNK].copy(), n, d, y, weights[start : start + CHUNK], delta, steps)
        for start in range(0, len(theta), CHUNK)
    ]
    return np.concatenate([rows for rows, _ in found]), np.concatenate([values for _, values in found])


def _descend_chunk(
    theta: Array, n: Array, d: Array, y: Array, weights: Array, delta: float, steps: int
) -> tuple[Array, Array]:
    value = (weights * _huber(_residuals(theta, n, d, y)[0], delta)).sum(axis=1)
    damping, stalled = np.full(len(theta), 1e-2), np.zeros(len(theta))
    for _ in range(steps):
        live = np.flatnonzero(stalled < PATIENCE)
        if not len(live):
            break
        proposal = theta[live] - _step(theta[live], n, d, y, weights[live], damping[live], delta)
        new_value = (weights[live] * _huber(_residuals(proposal, n, d, y)[0], delta)).sum(axis=1)
        better = new_value < value[live]
        stalled[live] = np.where(new_value < value[live] * (1 - 1e-9), 0, stalled[live] + 1)
        theta[live[better]], value[live[better]] = proposal[better], new_value[better]
        damping[live] = np.clip(np.where(better, damping[live] / 3, damping[live] * 4), 1e-9, 1e9)
    return theta, value


def _step(theta: Array, n: Array, d: Array, y: Array, weights: Array, damping: Array, delta: float) -> Array:
    """Return a damped Gauss-Newton step [S, 5] for the reweighted squares."""
    residuals, shares = _residuals(theta, n, d, y)
    jacobian = _jacobian(shares, n, d)
    weighted = jacobian * (weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300)))[:, None]
    gradient = (weighted @ residuals[:, :, None])[:, :, 0]
    hessian = weighted @ jacobian.transpose(0, 2, 1)
    diagonal = np.arange(5)
    scale = hessian[:, diagonal, diagonal]
    hessian[:, diagonal, diagonal] += damping[:, None] * scale + 1e-12 * scale.max(axis=1, keepdims=True) + 1e-30
    return np.asarray(np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0])


def _polish(theta: Array, n: Array, d: Array, y: Array, delta: float) -> tuple[float, Array]:
    from scipy.optimize import minimize

    def objective(values: Array) -> tuple[float, Array]:
        residuals, shares = _residuals(values[None], n, d, y)
        slopes = np.clip(residuals[0], -delta, delta)
        return float(_huber(residuals[0], delta).sum()) / delta, _jacobian(shares, n, d)[0] @ slopes / delta

    found = minimize(objective, theta, jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 400})
    return float(found.fun) * delta, found.x
