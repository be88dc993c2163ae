"""Say in words what attention entropies show. The two failures of softmax-only networks are defined here alone.

A head's share is its mean entropy E over the ceiling, the largest that a causal mask allows: query i attends to i
positions, so its entropy is at most ln i nats, and their mean at most ln(T!)/T.

    share = E / (ln(T!)/T)

    collapsed     share below 0.05    the head looks at about one token. Gradients through softmax vanish, and networks
                                      without norms go on to NaN
    healthy       between
    overloaded    share above 0.98    the head looks at all tokens alike, as every head does before training

A layer has collapsed if the mean share of its heads is below 0.05. Warnings, records of lost runs, reports and pictures
all use these limits.

The paper (arXiv 2501.03489) divides by the largest entropy of any head of the network instead. It calls the lowest
quarter of that range collapsed and the highest overloaded. By that definition a network whose heads are alike is
overloaded as a whole, wherever they lie, and a head changes its class when another head does. The ceiling depends on T
alone, so shares compare between heads, steps and networks. Shares that the paper publishes do not compare with these.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

COLLAPSE_SHARE = 0.05
"""A head or layer below this share of the ceiling has collapsed: 0.19 nats at T = 128, 1.2 tokens attended to."""
OVERLOAD_SHARE = 0.98
"""A head above this share is overloaded: at T = 128 it attends to 93% of the tokens that it sees, if to all alike."""
CLASSES = ("collapsed: below 5%", "healthy: 5 to 50%", "healthy: 50 to 98%", "overloaded: above 98%")
"""Classes of heads by share of the ceiling, lowest first. Pictures show healthy heads in two classes."""

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


def class_of(entropy_nats: float, seq_length: int) -> int:
    """Return the index in CLASSES of a head's mean entropy, which is finite."""
    ceiling = ceiling_nats(seq_length)
    is_beyond = (
        entropy_nats >= COLLAPSE_SHARE * ceiling,
        entropy_nats >= 0.5 * ceiling,
        entropy_nats > OVERLOAD_SHARE * ceiling,
    )
    return sum(is_beyond)


def class_shares(entropies: Iterable[Iterable[float]], seq_length: int) -> list[float]:
    """Return the part of all finite heads that is in each of the CLASSES; all NaN if no head is finite."""
    found = [class_of(entropy, seq_length) for heads in entropies for entropy in heads if math.isfinite(entropy)]
    return [found.count(index) / len(found) if found else math.nan for index in range(len(CLASSES))]


def layer_means(entropies: Entropies) -> list[float]:
    """Return the mean entropy of each layer's heads."""
    return [sum(heads) / len(heads) for heads in entropies]


def fallen_layers(entropies: Entropies, seq_length: int) -> list[int]:
    """Return the layers that have collapsed or are not finite, in order of depth."""
    limit = COLLAPSE_SHARE * ceiling_nats(seq_length)
    return [layer for layer, mean in enumerate(layer_means(entropies)) if not mean >= limit]


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
    last = len(CLASSES) - 1
    overloaded = sum(math.isfinite(entropy) and class_of(entropy, seq_length) == last for entropy in heads)
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
