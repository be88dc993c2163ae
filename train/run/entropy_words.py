"""Say in words what attention entropies show. The two failures of softmax-only networks are defined here alone.

collapse    a layer's heads look at one token each: its mean entropy is near 0. Gradients through softmax vanish, and
            networks without norms go on to NaN.
overload    a head looks at all tokens alike: its entropy is near the largest that a causal mask allows, ln(T!)/T.

Three readers ask for the failures in three ways, so there are three thresholds:

warnings of a training   COLLAPSE_SHARE, OVERLOAD_SHARE: shares of the ceiling, so that they mean the same for every T
record of a lost run     COLLAPSED_NATS: far below the warning. A layer there was lost before the run became NaN
pictures                 QUARTERS: of the largest entropy of any head, as in the paper's figures, whatever the ceiling
"""

import math
from dataclasses import dataclass

COLLAPSE_SHARE = 0.05
"""A layer whose mean entropy is below this share of the ceiling has collapsed: 0.19 nats at T = 128."""
OVERLOAD_SHARE = 0.98
"""A head whose entropy is above this share of the ceiling is overloaded."""
COLLAPSED_NATS = 0.05
"""A layer whose mean entropy is below this has collapsed for good, as the record of a diverged run says."""
QUARTERS = ("collapsed: 0 to 1/4 of max", "healthy: 1/4 to 1/2", "healthy: 1/2 to 3/4", "overloaded: 3/4 to max")
"""Quarters of the largest head entropy, lowest first (arXiv 2501.03489): the two ends are the two failures."""

Entropies = list[list[float]]
"""Mean entropy of each head in nats, `[L][N]`."""


@dataclass(frozen=True)
class Fall:
    """The first layer that collapsed or was not finite."""

    layer: int
    step: int
    mean_entropy_nats: float

    def __str__(self) -> str:
        how = "is not finite" if not math.isfinite(self.mean_entropy_nats) else f"is {self.mean_entropy_nats:.3f} nats"
        return f"layer {self.layer} fell first: at step {self.step} its mean entropy {how}"


def ceiling_nats(seq_length: int) -> float:
    """Return the largest mean entropy of a causal head, ln(T!)/T: query i attends to i positions, at most ln i nats."""
    return math.lgamma(seq_length + 1) / seq_length


def layer_means(entropies: Entropies) -> list[float]:
    """Return the mean entropy of each layer's heads."""
    return [sum(heads) / len(heads) for heads in entropies]


def fallen_layers(entropies: Entropies, seq_length: int) -> list[int]:
    """Return the layers that have collapsed (by COLLAPSE_SHARE) or are not finite, in order of depth."""
    limit = COLLAPSE_SHARE * ceiling_nats(seq_length)
    return [layer for layer, mean in enumerate(layer_means(entropies)) if not mean >= limit]


def collapsed_layers(entropies: Entropies) -> list[int]:
    """Return the layers that have collapsed for good (by COLLAPSED_NATS), in order of depth."""
    return [layer for layer, mean in enumerate(layer_means(entropies)) if mean < COLLAPSED_NATS]


def first_fall(history: list[tuple[int, Entropies]], seq_length: int) -> Fall | None:
    """Return the first layer that fell.

    Args:
        history: (step, entropies) of consecutive steps.
        seq_length: T, in tokens.

    Returns:
        Of several layers in one step, one that is not finite, else the one with the lowest mean; None if none fell.
    """
    for step, entropies in history:
        means, fallen = layer_means(entropies), fallen_layers(entropies, seq_length)
        not_finite = [layer for layer in fallen if not math.isfinite(means[layer])]
        if fallen:
            layer = not_finite[0] if not_finite else min(fallen, key=lambda layer: means[layer])
            return Fall(layer, step, means[layer])
    return None


def describe(entropies: Entropies, seq_length: int) -> str:
    """Describe in one line which layers collapsed or are not finite and how many heads are overloaded, if any."""
    ceiling, means = ceiling_nats(seq_length), layer_means(entropies)
    fallen = fallen_layers(entropies, seq_length)
    collapsed = [f"{layer} ({means[layer]:.2f})" for layer in fallen if math.isfinite(means[layer])]
    not_finite = [str(layer) for layer in fallen if not math.isfinite(means[layer])]
    heads = [entropy for layer in entropies for entropy in layer]
    overloaded = sum(entropy > OVERLOAD_SHARE * ceiling for entropy in heads)
    parts = []
    if collapsed:
        parts.append(f"entropy collapse in layers {', '.join(collapsed)} (mean nats)")
    if not_finite:
        parts.append(f"entropies not finite in layers {', '.join(not_finite)}")
    if overloaded:
        parts.append(
            f"entropic overload in {overloaded} of {len(heads)} heads (above {OVERLOAD_SHARE:.0%} of the ceiling)"
        )
    return "; ".join(parts or ["no layer collapsed, no head overloaded"]) + f"; ceiling ln(T!)/T = {ceiling:.2f} nats"
