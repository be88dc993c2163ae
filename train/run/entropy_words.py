"""Names what attention entropies show, in words: this method's own ways to fail.

collapse: a layer's heads look at one token each, its mean entropy is near 0; gradients through softmax vanish, and
networks without norms go on to NaN. overload: a head looks at all tokens alike, its entropy is near the largest that a
causal mask allows, ln(T!)/T.
"""

import math
from dataclasses import dataclass

COLLAPSE_SHARE = 0.05
OVERLOAD_SHARE = 0.98
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
    """ln(T!)/T: the mean entropy of uniform attention under a causal mask."""
    return math.lgamma(seq_length + 1) / seq_length


def layer_means(entropies: Entropies) -> list[float]:
    return [sum(heads) / len(heads) for heads in entropies]


def fallen_layers(entropies: Entropies, seq_length: int) -> list[int]:
    """Layers whose mean entropy is near 0 or not finite, the lowest first."""
    limit = COLLAPSE_SHARE * ceiling_nats(seq_length)
    return [layer for layer, mean in enumerate(layer_means(entropies)) if not mean >= limit]


def first_fall(history: list[tuple[int, Entropies]], seq_length: int) -> Fall | None:
    """The earliest fall in (step, entropies) of consecutive steps; of several layers at once the lowest-lying mean."""
    for step, entropies in history:
        means, fallen = layer_means(entropies), fallen_layers(entropies, seq_length)
        not_finite = [layer for layer in fallen if not math.isfinite(means[layer])]
        if fallen:
            layer = not_finite[0] if not_finite else min(fallen, key=lambda layer: means[layer])
            return Fall(layer, step, means[layer])
    return None


def describe(entropies: Entropies, seq_length: int) -> str:
    """One line: collapsed layers, layers that are not finite, overloaded heads; or that all are in between."""
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
