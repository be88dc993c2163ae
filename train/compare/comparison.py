"""How far what a layout measured lies from what one process did, and whether that is more than rounding.

A gradient's error is |found - expected| / max(|expected|, 1e-2 |all gradients|): with the tolerance of 1e-5 that is a
ten-millionth of all gradients, float32's own resolution, below which rounding would decide. A gradient that is exactly
zero, missing or not a number where one is expected is lost, however small it should be. A single number is lost if
it is zero in every batch: in bf16 two ranks' parts of a small one may cancel.

Some models lose more than that to float32 itself: where the softmax is saturated (scores of a hundred are rounded by
1e-5, and probabilities by as large a part of themselves), or where a LayerNorm has one to three features: its gradient
cancels to zero. What one process loses there is its error in float32 against itself in float64; a layout, which adds
in another order, loses about as much. More than a percent is no excuse: a wrong sum need not be further off.

In the arithmetic of training (bf16, compiled) rounding is all there is to see, and each parameter has its own: the
error of one process in the same arithmetic. A layout rounds as often, in another order, so `Allowance` grants it
TRAINED_FACTOR times the error of one process, the largest of that parameter's kind (its name in any layer), so that an
error that is small by luck is no trap, and one rounding of the type on top. Single numbers (alpha, beta) are one kind,
with a factor of their own: nothing averages their errors. A gradient below what it may be off is named: of it only a
loss would be seen.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.names import kind_of, zero_by_chance
from train.compare.measurement import Measured

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
GRADIENT_FLOOR = 1e-2  # of the norm of all gradients
ROUNDING_FACTOR = 5.0  # of 220 random layouts the worst had 4.8 times one process's error, all others below 4
LARGEST_EXCUSE = 1e-2
TRAINED_FACTOR = 1.5
"""Of 174 random tiny layouts in bf16 the worst had 1.13 times one process's error and a rounding; on two H200s 1.1."""
SINGLE_FACTOR = 6.0
"""Of single numbers, where the worst of the same layouts had 4.0, the next 1.8 times the largest error of all of them.
Those of all layers share the rounding of what comes in, so that all may be small by luck."""
SINGLE = "single numbers"
ROUNDING = {"bf16": 2.0**-8, "fp32": TOLERANCE["float32"]}
"""Relative, of what a precision computes."""
MEAN_OF_MANY = 1 / 8
"""Of a rounding: what remains of it in a loss or a norm, which are taken over all tokens or elements."""

Gradients = dict[str, Tensor]
"""Whole gradients by global name."""


@dataclass(frozen=True)
class Comparison:
    """Errors of one layout against one process, relative but for entropies, the largest over batches.

    The worst parameter is the one whose gradient's error is largest, or with an allowance largest beside what is
    allowed.
    """

    loss: float
    gradient_norm: float
    entropy_nats: float
    gradient: float
    worst_parameter: str
    lost: list[str] = field(default_factory=list)

    def within(self, tolerance: float, rounding: "Comparison | None" = None) -> bool:
        """Whether nothing is lost and every error is within the tolerance, or its like in `rounding` excuses it: five
        times that, or a percent.

        The norm is excused as the gradients are, since a single number may come out right by chance; the loss is not.

        Args:
            rounding: one process in the layout's type against one in float64.
        """

        def limit(rounded: float) -> float:
            return max(tolerance, min(ROUNDING_FACTOR * rounded, LARGEST_EXCUSE))

        gradient, entropy = (rounding.gradient, rounding.entropy_nats) if rounding else (0.0, 0.0)
        return not self.lost and (  # NaN is beyond any limit
            self.loss <= tolerance
            and self.entropy_nats <= limit(entropy)
            and self.gradient_norm <= limit(gradient)
            and self.gradient <= limit(gradient)
        )


@dataclass(frozen=True)
class Allowance:
    """The largest errors of a layout in the arithmetic of training."""

    loss: float
    gradient_norm: float
    entropy_nats: float
    gradient: dict[str, float]  # by global name
    lost: list[str]  # by one process itself; then no layout passes
    unseen: list[str]  # parameters whose gradient is smaller than what it may be off

    @classmethod
    def of(cls, one_process: Measured, truth: Measured, precision: str) -> "Allowance":
        """From what one process in that arithmetic loses."""
        rounding, lost = ROUNDING[precision], compare(one_process, truth)
        largest_entropy = float(torch.stack(truth.entropy_nats).max())
        errors = _errors_over_batches(one_process.gradients, truth.gradients)
        limits = gradient_limits(errors, truth.gradients[0], rounding)
        return cls(
            loss=TRAINED_FACTOR * lost.loss + MEAN_OF_MANY * rounding,
            gradient_norm=TRAINED_FACTOR * lost.gradient_norm + MEAN_OF_MANY * rounding,
            entropy_nats=TRAINED_FACTOR * lost.entropy_nats + MEAN_OF_MANY * rounding * largest_entropy,
            gradient=limits,
            lost=lost.lost,
            unseen=_unseen(truth.gradients, limits),
        )

    def covers(self, result: Comparison) -> bool:
        """Whether nothing is lost and every error is allowed."""
        return not (result.lost or self.lost) and (
            result.loss <= self.loss
            and result.gradient_norm <= self.gradient_norm
            and result.entropy_nats <= self.entropy_nats
            and result.gradient <= self.gradient[result.worst_parameter]
        )


def compare(found: Measured, expected: Measured, allowance: Allowance | None = None) -> Comparison:
    """The largest errors over all batches."""
    errors = _errors_over_batches(found.gradients, expected.gradients)
    worst = worst_of(errors, None if allowance is None else allowance.gradient)
    relative = _relative(found.losses, expected.losses)
    whole = _relative(found.losses[:, :2].sum(1), expected.losses[:, :2].sum(1))
    return Comparison(
        loss=float(torch.maximum(whole.max(), relative[:, 0].max())),
        gradient_norm=float(relative[:, 2].max()),
        entropy_nats=float((torch.stack(found.entropy_nats) - torch.stack(expected.entropy_nats)).abs().max()),
        gradient=errors[worst],
        worst_parameter=worst,
        lost=_lost_over_batches(found.gradients, expected.gradients),
    )


def gradient_errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Each gradient's relative error, infinite where it or a part of it is missing."""
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().clamp_min(1e-30)
    return {
        name: float((found[name] - gradient).norm() / torch.maximum(gradient.norm(), GRADIENT_FLOOR * whole))
        if name in found and found[name].shape == gradient.shape
        else float("inf")
        for name, gradient in expected.items()
    }


def lost_gradients(found: Gradients, expected: Gradients) -> list[str]:
    """Names whose gradient is exactly zero, missing or not finite, and expected to be something."""
    return [name for name, gradient in expected.items() if gradient.any() and not _is_there(found.get(name), gradient)]


def lost_in_one_step(found: Gradients, expected: Gradients) -> list[str]:
    """Return `lost_gradients` without single numbers that may be zero by chance (`zero_by_chance`)."""
    lost = lost_gradients(found, expected)
    singles = [name for name, gradient in expected.items() if gradient.numel() == 1 and gradient.any()]
    present = [name for name in singles if name in found and found[name].numel() == 1]
    by_chance = zero_by_chance([name for name in present if not found[name].any()], singles)
    return [name for name in lost if name not in by_chance]


def gradient_limits(errors: dict[str, float], expected: Gradients, rounding: float) -> dict[str, float]:
    """What each gradient of a layout may be off: from the largest error of its kind on one process.

    Args:
        errors: of one process, by global name. One that is no number allows nothing beyond a rounding.
        expected: the same names; single numbers are told by their size.
    """
    kinds = {name: SINGLE if expected[name].numel() == 1 else kind_of(name) for name in errors}
    largest = dict.fromkeys(kinds.values(), 0.0)
    for name, error in errors.items():
        if math.isfinite(error):
            largest[kinds[name]] = max(largest[kinds[name]], error)
    factors = {name: SINGLE_FACTOR if kind == SINGLE else TRAINED_FACTOR for name, kind in kinds.items()}
    return {name: factors[name] * largest[kind] + rounding for name, kind in kinds.items()}


def worst_of(errors: dict[str, float], limits: dict[str, float] | None = None) -> str:
    """The parameter with the largest error, or with limits with the largest beside its own; NaN is the largest."""

    def size(name: str) -> tuple[bool, float]:
        error = errors[name] if limits is None else errors[name] / limits[name]
        return error != error, error

    return max(errors, key=size)


def _is_there(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and found.shape == expected.shape and bool(found.isfinite().all()) and bool(found.any())


def _lost_over_batches(found: list[Gradients], expected: list[Gradients]) -> list[str]:
    """Names lost in any batch; of single numbers that are zero, those lost in every batch that expects one."""
    lost = [name for one, other in zip(found, expected, strict=True) for name in lost_gradients(one, other)]

    def by_chance(name: str) -> bool:
        may_cancel = expected[0][name].numel() == 1 and all(name in one and one[name].isfinite().all() for one in found)
        return may_cancel and lost.count(name) < sum(bool(other[name].any()) for other in expected)

    return [name for name in dict.fromkeys(lost) if not by_chance(name)]


def _unseen(expected: list[Gradients], limits: dict[str, float]) -> list[str]:
    """Names whose gradient, were it doubled or missing, would be off by no more than allowed, in every batch."""
    nothing = [{name: torch.zeros_like(gradient) for name, gradient in batch.items()} for batch in expected]
    sizes = _errors_over_batches(nothing, expected)
    return [name for name, size in sizes.items() if 0 < size <= limits[name]]


def _errors_over_batches(found: Iterable[Gradients], expected: Iterable[Gradients]) -> dict[str, float]:
    """The largest error of each gradient; NaN stays."""
    batches = [gradient_errors(one, other) for one, other in zip(found, expected, strict=True)]
    return {
        name: max((batch[name] for batch in batches), key=lambda error: (error != error, error)) for name in batches[0]
    }


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs() / expected.abs().clamp_min(1e-30)  # a single token has loss 0
