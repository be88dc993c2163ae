"""How far what a layout measured lies from what one process did, and whether that is more than rounding.

A gradient's error is |found - expected| / max(|expected|, 1e-2 |all gradients|): with the tolerance of 1e-5 that is a
ten-millionth of all gradients, float32's own resolution, below which rounding would decide.

Some models lose more than that to float32 itself: where the softmax is saturated (scores of a hundred are rounded by
1e-5, and probabilities by as large a part of themselves), or where a LayerNorm has one to three features: its gradient
cancels to zero. What one process loses there is its error in float32 against itself in float64; a layout, which adds
in another order, loses about as much. More than a percent is no excuse: a wrong sum need not be further off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.measurement import Measured

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
GRADIENT_FLOOR = 1e-2  # of the norm of all gradients
ROUNDING_FACTOR = 5.0  # of 220 random layouts the worst had 4.8 times one process's error, all others below 4
LARGEST_EXCUSE = 1e-2


@dataclass(frozen=True)
class Comparison:
    """Errors of one layout against one process, relative but for entropies, the largest over batches."""

    loss: float
    gradient_norm: float
    entropy_nats: float
    gradient: float
    worst_parameter: str

    def within(self, tolerance: float, rounding: "Comparison | None" = None) -> bool:
        """Whether every error is within the tolerance, or its like in `rounding` excuses it: five times that, or a
        percent.

        The norm is excused as the gradients are, since a single number may come out right by chance; the loss is not.

        Args:
            rounding: one process in the layout's type against one in float64.
        """

        def limit(rounded: float) -> float:
            return max(tolerance, min(ROUNDING_FACTOR * rounded, LARGEST_EXCUSE))

        gradient, entropy = (rounding.gradient, rounding.entropy_nats) if rounding else (0.0, 0.0)
        return (  # NaN is beyond any limit
            self.loss <= tolerance
            and self.entropy_nats <= limit(entropy)
            and self.gradient_norm <= limit(gradient)
            and self.gradient <= limit(gradient)
        )


def compare(found: Measured, expected: Measured) -> Comparison:
    """The largest errors over all batches."""
    worst = max(
        (_worst_gradient(a, b) for a, b in zip(found.gradients, expected.gradients, strict=True)),
        key=lambda pair: pair[0] if pair[0] == pair[0] else float("inf"),
    )
    relative = _relative(found.losses, expected.losses)
    whole = _relative(found.losses[:, :2].sum(1), expected.losses[:, :2].sum(1))
    return Comparison(
        loss=float(torch.maximum(whole.max(), relative[:, 0].max())),
        gradient_norm=float(relative[:, 2].max()),
        entropy_nats=float((torch.stack(found.entropy_nats) - torch.stack(expected.entropy_nats)).abs().max()),
        gradient=worst[0],
        worst_parameter=worst[1],
    )


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs() / expected.abs().clamp_min(1e-30)  # a single token has loss 0


def _worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().clamp_min(1e-30)
    errors = {}
    for name, gradient in expected.items():
        errors[name] = float((found[name] - gradient).norm() / torch.maximum(gradient.norm(), GRADIENT_FLOOR * whole))
    return max(((error, name) for name, error in errors.items()), key=lambda pair: (pair[0] != pair[0], pair[0]))
