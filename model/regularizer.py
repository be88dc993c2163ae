"""The entropy regularizer: holds every head's attention entropy near a learned threshold (arXiv 2501.03489, Algorithm
1).

    delta   = entropy - theta ln T            (nats; ln T, not the causal maximum)
    penalty = delta^2  where |delta| > margin ln T, else 0
    loss    = CE + coefficient * mean over layers, mean over heads of the penalty

The published code and the published algorithm take delta at different granularities, so this is a choice:

- `per_query`, as in the published code and results: take delta at every query position of every sequence, then average
  the penalties.
- `per_head`, as in Algorithm 1: average the entropy over positions and sequences, then take delta once per head.

The published code sums over the sequences and positions of a micro-batch, so its lambda depends on their number.
`coefficient` multiplies a mean instead: coefficient = lambda * micro_batch_size * T. For the paper's CodeParrot runs
that is 1e-5 * 128 * 128 = 0.164.

The published penalty has two oddities, and a key for each leaves them out. With R for what theta and the margin are
fractions of:

    shape    square   delta^2 where |delta| > margin R, else 0    (published: jumps by (margin R)^2 at its margin)
             hinge    (|delta| - margin R)_+^2                    (the same tolerance without the jump)
             floor    (-delta - margin R)_+^2                     (the half of hinge that opposes collapse)
    target   constant R = ln T                                    (published: row i cannot exceed ln(i + 1))
             causal   R_i = ln(i + 1)                             (what row i can reach; row 0 has no penalty)

The paper keeps the coefficient constant. With schedule = 'learning_rate' it is coefficient * rate / peak rate in every
step, so that the penalty warms up and fades with the steps that it protects.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import explained


@dataclass(frozen=True)
class RegularizerConfig:
    """Strength and shape of the entropy penalty. It acts if `model.regularized` is true."""

    coefficient: float = explained(
        0.164, "Weight of the penalty in the loss per token, in 1/nat^2: the paper's lambda * micro-batch * T."
    )
    margin: float | list[float] = explained(
        0.20,
        "Tolerance gamma as a fraction of ln T: one number for all layers, or a list with one for each. There is no "
        "penalty while the entropy stays this close to theta ln T. The paper uses 0 to 0.30.",
    )
    granularity: Literal["per_query", "per_head"] = explained(
        "per_query",
        "'per_query' penalizes the entropy of each query (published code). 'per_head' penalizes the mean entropy of a "
        "head over one micro-batch of all data-parallel ranks (published algorithm).",
    )
    shape: Literal["square", "hinge", "floor"] = explained(
        "square",
        "How the penalty grows outside the margin. 'square' is the whole deviation squared (published), which jumps at "
        "the margin. 'hinge' squares what exceeds the margin. 'floor' is the hinge of entropies that are too low, and "
        "leaves high ones alone; a learned threshold can then only fall.",
    )
    target: Literal["constant", "causal"] = explained(
        "constant",
        "What threshold and margin are fractions of. 'constant': ln T for every query (published). 'causal': the "
        "largest entropy that each query can reach, ln(i + 1) at position i; needs granularity = 'per_query'.",
    )
    schedule: Literal["constant", "learning_rate"] = explained(
        "constant",
        "How the coefficient changes over a run. 'constant': not at all (published). 'learning_rate': in each step it "
        "is multiplied by the learning rate's ratio to its peak.",
    )

    def margins(self, layers: Sequence[int]) -> Tensor:
        """Return gamma of each of these layers of the model, float64."""
        every = self.margin
        return torch.tensor([every[i] if isinstance(every, list) else every for i in layers], dtype=torch.float64)

    def faults(self, num_layers: int) -> list[str]:
        """Return every reason why a model of so many layers cannot be trained so."""
        faults = []
        if self.coefficient < 0:
            faults.append(f"regularizer.coefficient = {self.coefficient} must not be negative; 0 turns the penalty off")
        if isinstance(self.margin, list) and len(self.margin) != num_layers:
            faults.append(
                f"regularizer.margin has {len(self.margin)} numbers, and model.num_layers = {num_layers}: give one "
                "number for all layers, or one for each"
            )
        for margin in self.margin if isinstance(self.margin, list) else [self.margin]:
            if not 0 <= margin < 1:
                faults.append(f"regularizer.margin = {margin} must lie in [0, 1): it is a fraction of ln T")
        if self.target == "causal" and self.granularity == "per_head":
            faults.append(
                "regularizer.target = 'causal' needs regularizer.granularity = 'per_query': 'per_head' compares one "
                "mean over all queries with one target"
            )
        return faults


def reachable_entropy(
    config: RegularizerConfig, seq_length: int, entropy: Tensor, document_start_BT: Tensor | None = None
) -> float | Tensor:
    """Return R, what thresholds and margin are fractions of, in nats.

    Args:
        seq_length: T.
        entropy: whose device and type the result has.
        document_start_BT: for attention within documents, the first position that each query attends to.

    Returns:
        ln T for a constant target. For a causal one ln of the number of positions that each query attends to: [T], or
        [B, 1, T] within documents.
    """
    if config.target == "constant":
        return math.log(seq_length)
    count = torch.arange(1, seq_length + 1, device=entropy.device)
    if document_start_BT is not None:
        count = (count - document_start_BT).unsqueeze(1)
    return count.to(entropy.dtype).log()


def penalty(
    entropy: Tensor,
    threshold: Tensor,
    margin: float | Tensor,
    reachable: float | Tensor,
    shape: Literal["square", "hinge", "floor"] = "square",
) -> Tensor:
    """Return the penalty of each entropy.

    Args:
        entropy: nats, any shape that the next three broadcast to.
        threshold: theta as a fraction of `reachable`.
        margin: gamma as a fraction of `reachable`.
        reachable: R in nats.
        shape: how it grows outside the margin (see the top of this file).
    """
    delta, tolerated = entropy - threshold * reachable, margin * reachable
    if shape == "square":
        return torch.where(delta.abs() > tolerated, delta.square(), 0.0)
    distance = delta.abs() if shape == "hinge" else -delta
    return (distance - tolerated).relu().square()


def entropy_penalty(
    entropies_BNT: list[Tensor],
    thresholds_N: list[Tensor],
    config: RegularizerConfig,
    seq_length: int,
    document_start_BT: Tensor | None = None,
) -> Tensor:
    """Return the regularizer of a whole model on one process: a scalar, before the coefficient.

    Args:
        entropies_BNT: one tensor of entropies in nats for each layer.
        thresholds_N: theta of each layer's heads.
        seq_length: T.
        document_start_BT: for attention within documents, the first position that each query attends to.
    """
    entropy_LBNT = torch.stack(entropies_BNT)
    threshold_LN = torch.stack([threshold.to(entropy_LBNT.dtype) for threshold in thresholds_N])
    margin_L1 = config.margins(range(len(entropies_BNT))).to(entropy_LBNT).unsqueeze(1)
    reachable = reachable_entropy(config, seq_length, entropy_LBNT, document_start_BT)
    if config.granularity == "per_head":
        return penalty(entropy_LBNT.mean(dim=(1, 3)), threshold_LN, margin_L1, reachable, config.shape).mean()
    theta, margin = threshold_LN[:, None, :, None], margin_L1[:, None, :, None]
    return penalty(entropy_LBNT, theta, margin, reachable, config.shape).mean()
