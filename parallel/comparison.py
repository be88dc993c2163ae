"""How far what a layout measured lies from what one process did, and whether that is more than rounding.

A gradient's error is |found - expected| / max(|expected|, 1e-2 |all gradients|): with the tolerance of 1e-5 that is a
ten-millionth of all gradients, float32's own resolution, below which rounding would decide. A gradient that is exactly
zero, missing or not a number where one is expected is lost, however small it should be.

Some models lose more than that to float32 itself: where the softmax is saturated (scores of a hundred are rounded by
1e-5, and probabilities by as large a part of themselves), or where a LayerNorm has one to three features: its gradient
cancels to zero. What one process loses there is its error in float32 against itself in float64; a layout, which adds
in another order, loses about as much. More than a percent is no excuse: a wrong sum need not be further off.

In the arithmetic of training (bf16, compiled) rounding is all there is to see, and each parameter has its own: the
error of one process in the same arithmetic. A layout rounds as often, in another order, so `Allowance` grants it
TRAINED_FACTOR times the error of one process, the largest of that parameter's kind (its name in any layer), so that an
error that is small by luck is no trap, and one rounding of the type on top.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.measurement import Measured

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
GRADIENT_FLOOR = 1e-2  # of the norm of all gradients
ROUNDING_FACTOR = 5.0  # of 220 random layouts the worst had 4.8 times one process's error, all others below 4
LARGEST_EXCUSE = 1e-2
TRAINED_FACTOR = 1.5
"""On two H200s, layouts in bf16 had 0.97 to 1.1 times the error of one process."""
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
    gradient: dict[str, float]  # by kind of parameter

    @classmethod
    def of(cls, one_process: Measured, truth: Measured, precision: str) -> "Allowance":
        """From what one process in that arithmetic loses."""
        rounding, lost = ROUNDING[precision], compare(one_process, truth)
        largest_entropy = float(torch.stack(truth.entropy_nats).max())
        errors = _errors_over_batches(one_process.gradients, truth.gradients)
        return cls(
            loss=TRAINED_FACTOR * lost.loss + MEAN_OF_MANY * rounding,
            gradient_norm=TRAINED_FACTOR * lost.gradient_norm + MEAN_OF_MANY * rounding,
            entropy_nats=TRAINED_FACTOR * lost.entropy_nats + MEAN_OF_MANY * rounding * largest_entropy,
            gradient=gradient_limits(errors, rounding),
        )

    def covers(self, result: Comparison) -> bool:
        """Whether nothing is lost and every error is allowed."""
        return not result.lost and (
            result.loss <= self.loss
            and result.gradient_norm <= self.gradient_norm
            and result.entropy_nats <= self.entropy_nats
            and result.gradient <= self.gradient[kind_of(result.worst_parameter)]
        )


def compare(found: Measured, expected: Measured, allowance: Allowance | None = None) -> Comparison:
    """The largest errors over all batches."""
    errors = _errors_over_batches(found.gradients, expected.gradients)
    worst = worst_of(errors, None if allowance is None else allowance.gradient)
    relative = _relative(found.losses, expected.losses)
    whole = _relative(found.losses[:, :2].sum(1), expected.losses[:, :2].sum(1))
    lost = {
        name: None
        for one, other in zip(found.gradients, expected.gradients, strict=True)
        for name in lost_gradients(one, other)
    }
    return Comparison(
        loss=float(torch.maximum(whole.max(), relative[:, 0].max())),
        gradient_norm=float(relative[:, 2].max()),
        entropy_nats=float((torch.stack(found.entropy_nats) - torch.stack(expected.entropy_nats)).abs().max()),
        gradient=errors[worst],
        worst_parameter=worst,
        lost=list(lost),
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


def gradient_limits(errors: dict[str, float], rounding: float) -> dict[str, float]:
    """What a layout's gradients may be off, by kind of parameter, from the errors of one process."""
    limits: dict[str, float] = {}
    for name, error in errors.items():
        limits[kind_of(name)] = max(limits.get(kind_of(name), 0.0), TRAINED_FACTOR * error + rounding)
    return limits


def worst_of(errors: dict[str, float], limits: dict[str, float] | None = None) -> str:
    """The parameter with the largest error, or with limits with the largest beside its own; NaN is the largest."""

    def size(name: str) -> tuple[bool, float]:
        error = errors[name] if limits is None else errors[name] / limits[kind_of(name)]
        return error != error, error

    return max(errors, key=size)


def kind_of(name: str) -> str:
    """A parameter's name in any layer: 'layers.3.ffn.alpha' -> 'layers.*.ffn.alpha'."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _is_there(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and found.shape == expected.shape and bool(found.isfinite().all()) and bool(found.any())


def _errors_over_batches(found: Iterable[Gradients], expected: Iterable[Gradients]) -> dict[str, float]:
    """The largest error of each gradient; NaN stays."""
    batches = [gradient_errors(one, other) for one, other in zip(found, expected, strict=True)]
    return {
        name: max((batch[name] for batch in batches), key=lambda error: (error != error, error)) for name in batches[0]
    }


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs() / expected.abs().clamp_min(1e-30)  # a single token has loss 0
