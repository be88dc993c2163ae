"""Compares what a layout measured with what one process measured, and decides whether the difference is rounding.

A gradient's error is |found - expected| / max(|expected|, 1e-2 |all gradients|). With the tolerance of 1e-5 the floor
is a ten-millionth of all gradients, which is the resolution of float32. A gradient is lost if it is exactly zero,
missing or not finite where one is expected, however small it should be. A single number is lost only if it is zero in
every batch: in bf16 the parts of two ranks may cancel.

Some models lose more than 1e-5 to float32 itself. A saturated softmax does: scores of a hundred are rounded by 1e-5,
and probabilities by the same relative error. So does a LayerNorm over one to three features, whose gradient cancels to
zero. One process then shows how much: its error in float32 against itself in float64. A layout adds in another order
and loses about as much. An error above a percent is never excused, since a wrong sum may be no further off.

In the arithmetic of training (bf16, compiled) all errors are rounding, and each parameter has its own scale: the error
of one process in the same arithmetic. A layout rounds as often, in another order. `Allowance` therefore grants
TRAINED_FACTOR times the largest error among parameters of the same kind (the same name in any layer), plus one rounding
of the type. The largest of a kind counts, since one process's error may be small by luck. Single numbers (alpha, beta)
form one kind with a factor of their own, because nothing averages their errors. A gradient smaller than its allowed
error is reported: of it, only a loss would be noticed.
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
ROUNDING_FACTOR = 5.0  # the worst of 220 random layouts had 4.8 times the error of one process; all others were below 4
LARGEST_EXCUSE = 1e-2
TRAINED_FACTOR = 1.5
"""The worst of 174 tiny random layouts in bf16 had 1.13 times one process's error plus a rounding; on two H200s 1.1."""
SINGLE_FACTOR = 6.0
"""For single numbers. The worst of the same layouts had 4.0 times the largest error among them, the next 1.8 times.
All layers share the rounding of their input, so all errors may be small by luck."""
SINGLE = "single numbers"
ROUNDING = {"bf16": 2.0**-8, "fp32": TOLERANCE["float32"]}
"""Relative rounding error of each precision."""
MEAN_OF_MANY = 1 / 8
"""Fraction of a rounding that remains in a loss or a norm, since these average over many tokens or elements."""

Gradients = dict[str, Tensor]
"""Whole gradients by global name."""


@dataclass(frozen=True)
class Comparison:
    """Errors of one layout against one process: the largest over batches; relative, but in nats for entropies.

    The worst parameter has the largest gradient error, or with an allowance the largest in units of what is allowed.
    """

    loss: float
    gradient_norm: float
    entropy_nats: float
    gradient: float
    worst_parameter: str
    lost: list[str] = field(default_factory=list)

    def within(self, tolerance: float, rounding: "Comparison | None" = None) -> bool:
        """Return whether nothing is lost and every error is within the tolerance or excused by rounding.

        Rounding excuses five times its own error, at most a percent. The gradient norm is excused like gradients, since
        a single number may come out right by chance. The loss is never excused.

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
    """The largest errors that a layout may have in the arithmetic of training."""

    loss: float
    gradient_norm: float
    entropy_nats: float
    gradient: dict[str, float]  # by global name
    lost: list[str]  # by one process itself; then no layout passes
    unseen: list[str]  # parameters whose gradient is smaller than its allowed error

    @classmethod
    def of(cls, one_process: Measured, truth: Measured, precision: str) -> "Allowance":
        """Derive the allowance from the errors of one process in that arithmetic."""
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
        """Return whether nothing is lost and every error is allowed."""
        return not (result.lost or self.lost) and (
            result.loss <= self.loss
            and result.gradient_norm <= self.gradient_norm
            and result.entropy_nats <= self.entropy_nats
            and result.gradient <= self.gradient[result.worst_parameter]
        )


def compare(found: Measured, expected: Measured, allowance: Allowance | None = None) -> Comparison:
    """Return the largest errors over all batches."""
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
    """Return each gradient's relative error; infinite if the gradient or a part of it is missing."""
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().clamp_min(1e-30)
    return {
        name: float((found[name] - gradient).norm() / torch.maximum(gradient.norm(), GRADIENT_FLOOR * whole))
        if name in found and found[name].shape == gradient.shape
        else float("inf")
        for name, gradient in expected.items()
    }


def lost_gradients(found: Gradients, expected: Gradients) -> list[str]:
    """Return the names whose gradient is exactly zero, missing or not finite although one is expected."""
    return [name for name, gradient in expected.items() if gradient.any() and not _is_there(found.get(name), gradient)]


def lost_in_one_step(found: Gradients, expected: Gradients) -> list[str]:
    """Return `lost_gradients` without single numbers that may be zero by chance (`zero_by_chance`)."""
    lost = lost_gradients(found, expected)
    singles = [name for name, gradient in expected.items() if gradient.numel() == 1 and gradient.any()]
    present = [name for name in singles if name in found and found[name].numel() == 1]
    by_chance = zero_by_chance([name for name in present if not found[name].any()], singles)
    return [name for name in lost if name not in by_chance]


def gradient_limits(errors: dict[str, float], expected: Gradients, rounding: float) -> dict[str, float]:
    """Return the allowed error of each gradient of a layout, from the largest error of its kind on one process.

    Args:
        errors: of one process, by global name. An error that is not finite allows only a rounding.
        expected: gradients under the same names; single numbers are recognized by their size.
        rounding: relative, of the precision.
    """
    kinds = {name: SINGLE if expected[name].numel() == 1 else kind_of(name) for name in errors}
    largest = dict.fromkeys(kinds.values(), 0.0)
    for name, error in errors.items():
        if math.isfinite(error):
            largest[kinds[name]] = max(largest[kinds[name]], error)
    factors = {name: SINGLE_FACTOR if kind == SINGLE else TRAINED_FACTOR for name, kind in kinds.items()}
    return {name: factors[name] * largest[kind] + rounding for name, kind in kinds.items()}


def worst_of(errors: dict[str, float], limits: dict[str, float] | None = None) -> str:
    """Return the parameter with the largest error, in units of its limit if limits are given. NaN counts as largest."""

    def size(name: str) -> tuple[bool, float]:
        error = errors[name] if limits is None else errors[name] / limits[name]
        return error != error, error

    return max(errors, key=size)


def _is_there(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and found.shape == expected.shape and bool(found.isfinite().all()) and bool(found.any())


def _lost_over_batches(found: list[Gradients], expected: list[Gradients]) -> list[str]:
    """Return the names lost in any batch; a single number that is zero must be lost in every batch that expects one."""
    lost = [name for one, other in zip(found, expected, strict=True) for name in lost_gradients(one, other)]

    def by_chance(name: str) -> bool:
        may_cancel = expected[0][name].numel() == 1 and all(name in one and one[name].isfinite().all() for one in found)
        return may_cancel and lost.count(name) < sum(bool(other[name].any()) for other in expected)

    return [name for name in dict.fromkeys(lost) if not by_chance(name)]


def _unseen(expected: list[Gradients], limits: dict[str, float]) -> list[str]:
    """Return the names whose gradient is smaller than its allowed error in every batch."""
    nothing = [{name: torch.zeros_like(gradient) for name, gradient in batch.items()} for batch in expected]
    sizes = _errors_over_batches(nothing, expected)
    return [name for name, size in sizes.items() if 0 < size <= limits[name]]


def _errors_over_batches(found: Iterable[Gradients], expected: Iterable[Gradients]) -> dict[str, float]:
    """Return the largest error of each gradient over batches; NaN counts as largest."""
    batches = [gradient_errors(one, other) for one, other in zip(found, expected, strict=True)]
    return {
        name: max((batch[name] for batch in batches), key=lambda error: (error != error, error)) for name in batches[0]
    }


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs() / expected.abs().clamp_min(1e-30)  # a single token has loss 0
